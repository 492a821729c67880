"""Lightning on 2 gloo ranks: DDP, its mixed precision with our scaler, manual optimization, resume, FSDP2."""

import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
from fusedamp import GradScaler, optim
from ranks import agreed, rank, spawned
from torch import nn
from trainers import LR, STEPS, WHY, as_torchrun, close, equal, net, rows, weights

pytest.importorskip("lightning", reason=WHY)
pytestmark = [pytest.mark.integration, pytest.mark.host, pytest.mark.filterwarnings("ignore")]
TOO_LARGE = 2.0**24  # gradients of FP16 autocast overflow


def module(make, manual=False, shard=False):
    import lightning.pytorch as pl

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.automatic_optimization = net(), not manual

        def configure_model(self):
            if shard:
                from torch.distributed.fsdp import fully_shard

                for layer in (self.net[0], self.net[2], self.net):
                    fully_shard(layer, mesh=self.device_mesh["data_parallel"])

        def training_step(self, batch, index):
            loss = nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])
            if not manual:
                return loss
            optimizer = self.optimizers()
            self.manual_backward(loss / 2)
            if index % 2:
                self.clip_gradients(optimizer, 1.0, "norm")
                optimizer.step()
                optimizer.zero_grad()

        def configure_optimizers(self):
            return make(self.parameters(), lr=LR)

    return Module()


def fit(made, steps, scaler=None, strategy="ddp", clip=1.0, batch=8, save=None, **options):
    import lightning.pytorch as pl
    from lightning.pytorch.plugins.precision import MixedPrecision

    as_torchrun()
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy=strategy,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)] if scaler else None,
        max_steps=steps,
        max_epochs=-1,
        gradient_clip_val=clip,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), batch_size=batch)
    trainer.fit(made, loader, **options)
    if save:
        trainer.save_checkpoint(save)
    return weights(made)


def shared_file():
    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    return Path(folder[0]) / "last.ckpt"


def as_torch(**options):
    """The same weights as with torch's AdamW in the same trainer."""
    made = [module(m, options.get("clip", 1.0) is None) for m in (optim.AdamW, torch.optim.AdamW)]
    close(*(fit(m, STEPS, **options) for m in made))


def mixed():
    """As torch's scaler: the same steps are skipped, and the ranks agree."""
    scalers = [Scaler("cpu", init_scale=TOO_LARGE) for Scaler in (GradScaler, torch.amp.GradScaler)]
    makers = (optim.AdamW, torch.optim.AdamW)
    close(*(fit(module(m), 12, s) for m, s in zip(makers, scalers, strict=True)), steps=12)
    assert agreed(scalers[0].get_scale()) == scalers[1].get_scale() < TOO_LARGE


def resumes(strategy=lambda: "ddp", shard=False, clip=1.0, **storage):
    def make(params, lr):
        return optim.AdamW(params, lr=lr, **storage)

    file = shared_file()

    def run(steps, **options):  # one batch per epoch: each step has the same data
        return fit(module(make, shard=shard), steps, strategy=strategy(), clip=clip, batch=32, **options)

    straight = run(8)
    run(4, save=file)
    assert rank() or file.exists()
    equal(run(8, ckpt_path=file, weights_only=False), straight)


def model_parallel(distributed):
    from lightning.pytorch.strategies import ModelParallelStrategy

    resumes(lambda: ModelParallelStrategy(2, 1, save_distributed_checkpoint=distributed), True, None)


SCENARIOS = {
    2: {
        "ddp": as_torch,
        "manual": partial(as_torch, clip=None),
        "mixed": mixed,
        "resumes": partial(resumes, state_dtype="int8", rounding_seed=3),
        "model parallel, whole": partial(model_parallel, False),
        "model parallel, sharded": partial(model_parallel, True),
    }
}
ranks, test_on_ranks = spawned(SCENARIOS)
