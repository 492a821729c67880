"""Trains with Lightning in mixed precision, on one device or, started by torchrun, on several (DDP).

torchrun --nproc-per-node 2 examples/lightning_module.py [--steps N] [--device cpu | cuda]
"""

import argparse
import os

import fusedamp
import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import nn


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def data(rows: int = 64 * 200) -> torch.utils.data.TensorDataset:
    """Make rows, and the means of their squares."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.square().mean(1, keepdim=True))


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        x, y = batch
        loss = (self.net(x).float() - y).square().mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return fusedamp.optim.AdamW(self.parameters(), lr=1e-2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    devices = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    trainer = pl.Trainer(
        accelerator="gpu" if options.device == "cuda" else "cpu",
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
        # precision="16-mixed" would make torch's scaler; the plugin takes ours.
        plugins=[MixedPrecision("16-mixed", options.device, scaler=fusedamp.GradScaler(options.device))],
        max_steps=options.steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    module = Module()
    trainer.fit(module, torch.utils.data.DataLoader(data(), batch_size=64))

    weights = torch.cat([p.detach().flatten() for p in module.parameters()])
    everyone = trainer.strategy.all_gather(weights).view(-1, weights.numel())
    assert (everyone == everyone[0]).all(), "ranks hold different weights"
    if trainer.is_global_zero:
        loss = trainer.callback_metrics
        print(f"step {trainer.global_step}  loss {loss['loss'].item():.4f}  ranks {trainer.world_size}")


if __name__ == "__main__":
    main()
