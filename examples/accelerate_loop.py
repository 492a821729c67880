"""Trains with Accelerate, on one device or, started by torchrun or accelerate launch, on several.

torchrun --nproc-per-node 2 examples/accelerate_loop.py [--steps N] [--device cpu | cuda]
"""

import argparse

import fusedamp
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import nn

MICRO_BATCHES = 2


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 1))


def data(rows: int = 64 * 200) -> torch.utils.data.TensorDataset:
    """Make rows, and the means of their squares."""
    x = torch.randn(rows, 16, generator=torch.Generator().manual_seed(0))
    return torch.utils.data.TensorDataset(x, x.square().mean(1, keepdim=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()

    cpu = options.device == "cpu"
    with (
        fusedamp.patch_torch()
    ):  # Accelerate makes torch's scaler itself: inside, this is fusedamp.GradScaler
        accelerator = Accelerator(
            cpu=cpu,
            mixed_precision="no" if cpu else "fp16",  # Accelerate has FP16 on accelerators only
            gradient_accumulation_steps=MICRO_BATCHES,
        )
    model = net()
    optimizer = fusedamp.optim.AdamW(model.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.995)
    loader = torch.utils.data.DataLoader(data(), batch_size=64)
    model, optimizer, schedule, loader = accelerator.prepare(model, optimizer, schedule, loader)

    done, loss = 0, torch.tensor(0.0)
    while done < options.steps:
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = (model(x).float() - y).square().mean()
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()  # Accelerate passes it on in the last micro-batch alone
                schedule.step()
                optimizer.zero_grad()
            done += accelerator.sync_gradients
            if done == options.steps:
                break

    everyone = gather_object([[p.tolist() for p in model.parameters()]])
    assert all(weights == everyone[0] for weights in everyone), "ranks hold different weights"
    accelerator.print(f"step {done}  loss {loss.item():.4f}  ranks {accelerator.num_processes}")
    accelerator.end_training()


if __name__ == "__main__":
    main()
