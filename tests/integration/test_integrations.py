"""Trainers of other projects run a tiny model on the CPU with our scaler and our AdamW.

Each provokes overflows by a scale that is too large, and must skip those steps, train on and resume.
"""

import copy

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from torch import nn

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]
WHY = "pip install fusedamp[integrations] to run it"
TOO_LARGE = 2.0**127  # any gradient above 2 overflows FP32


def data(n=32):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 4, generator=generator)
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def loss_of(net):
    x, y = data()
    return nn.functional.mse_loss(net(x), y).item()


def weights(net):
    return [p.detach().clone() for p in net.parameters()]


def same(ours, theirs):
    return all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_lightning(tmp_path):
    lightning = pytest.importorskip("lightning.pytorch", reason=WHY)
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net, self.scales, self.norms = model(), [], []

        def training_step(self, batch, index):
            return nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])

        def configure_optimizers(self):
            optimizer = optim.AdamW(self.parameters(), lr=1e-2)
            return [optimizer], [torch.optim.lr_scheduler.ConstantLR(optimizer)]

        def on_before_optimizer_step(self, optimizer):
            self.norms.append(max(p.grad.abs().max().item() for p in self.parameters()))
            self.scales.append(self.trainer.scaler.get_scale())

    def fit(module, steps, **options):
        scaler = GradScaler("cpu", init_scale=2.0**24)  # FP16 autocast overflows
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*data()), batch_size=32)
        trainer = lightning.Trainer(
            accelerator="cpu",
            plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)],
            max_steps=steps,
            gradient_clip_val=1.0,
            default_root_dir=tmp_path,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, loader, **options)
        trainer.save_checkpoint(tmp_path / "last.ckpt")
        return scaler

    module = Module()
    before = loss_of(module.net)
    scaler = fit(module, 60)
    assert scaler.get_scale() < 2.0**24
    assert scaler.overflow_report()
    assert loss_of(module.net) < before / 2
    assert module.norms[-1] < 100, "hooks see unscaled gradients"
    saved = torch.load(tmp_path / "last.ckpt", weights_only=False)
    assert saved["MixedPrecision"] == scaler.state_dict()
    resumed = Module()
    again = fit(resumed, 62, ckpt_path=tmp_path / "last.ckpt", weights_only=False)
    assert resumed.scales[0] == scaler.get_scale()
    assert again._get_growth_tracker() == scaler._get_growth_tracker() + 2


def test_accelerate():
    accelerate = pytest.importorskip("accelerate", reason=WHY)

    accelerator = accelerate.Accelerator(cpu=True)
    accelerator.scaler = GradScaler("cpu", init_scale=TOO_LARGE)
    net = model()
    raw = optim.AdamW(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LambdaLR(raw, lambda step: 0.99**step)
    prepared, optimizer, schedule = accelerator.prepare(net, raw, schedule)
    x, y = data()
    before, skipped = loss_of(net), 0
    for _ in range(60):
        optimizer.zero_grad()
        held, rate = weights(net), raw.param_groups[0]["lr"]
        accelerator.backward(nn.functional.mse_loss(prepared(x), y))
        optimizer.step()
        schedule.step()
        assert optimizer.step_was_skipped == same(weights(net), held)
        if optimizer.step_was_skipped:
            assert raw.param_groups[0]["lr"] == rate, "the schedule waits for skipped steps"
        skipped += optimizer.step_was_skipped
    assert 0 < skipped < 10
    assert accelerator.scaler.get_scale() == TOO_LARGE / 2**skipped
    assert loss_of(net) < before / 2
    assert copy.deepcopy(optimizer).state_dict().keys() == raw.state_dict().keys()


def test_accelerate_finds_our_scaler_under_patch_torch():
    pytest.importorskip("accelerate", reason=WHY)
    from accelerate.utils import GradScalerKwargs
    from accelerate.utils.modeling import get_grad_scaler

    with fusedamp.patch_torch():
        scaler = get_grad_scaler(None, **GradScalerKwargs(init_scale=32.0).to_kwargs())
    assert isinstance(scaler, GradScaler)


def test_hf_trainer(tmp_path):
    transformers = pytest.importorskip("transformers", reason=WHY)
    pytest.importorskip("accelerate", reason=WHY)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = model()

        def forward(self, x, labels):
            return {"loss": nn.functional.mse_loss(self.net(x), labels)}

    too_large = (
        2.0**70
    )  # the Trainer logs the norm of the scaled gradients in FP32: inf at 2**64, and NaN gradients
    x, y = data()
    samples = [{"x": a, "labels": b} for a, b in zip(x, y, strict=True)]

    def train(net, steps, **options):
        trainer = transformers.Trainer(
            net,
            transformers.TrainingArguments(
                str(tmp_path),
                use_cpu=True,
                max_steps=steps,
                save_steps=20,
                per_device_train_batch_size=32,
                max_grad_norm=0.0,  # on the CPU, Accelerate would clip them scaled
                report_to=[],
                disable_tqdm=True,
                dataloader_pin_memory=False,
            ),
            train_dataset=samples,
            optimizer_cls_and_kwargs=(optim.AdamW, {"lr": 3e-2}),
        )
        trainer.accelerator.scaler = GradScaler("cpu", init_scale=too_large)
        trainer.train(**options)
        return trainer

    net = Model()
    before = loss_of(net.net)
    trainer = train(net, 60)
    assert trainer.accelerator.scaler.get_scale() < too_large
    assert loss_of(net.net) < before / 2
    state = next(iter(trainer.optimizer.state_dict()["state"].values()))
    assert 40 < state["step"] < 60, "skipped steps do not count"
    resumed = Model()
    train(resumed, 60, resume_from_checkpoint=str(tmp_path / "checkpoint-40"))
    assert loss_of(resumed.net) < before / 2
