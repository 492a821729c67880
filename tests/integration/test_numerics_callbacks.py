"""Callbacks of Lightning and of the Hugging Face Trainer: records of a real run, in their logs."""

import csv
import importlib
import sys

import pytest
import torch
from fusedamp import GradScaler, optim
from fusedamp.numerics import Watch
from torch import nn
from trainers import WHY, Model, net, rows

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore")]


class Memory:
    def __init__(self):
        self.rows = []

    def log(self, step, values):
        self.rows.append((step, dict(values)))


def fit(tmp_path, callback, steps=8, optimizers=1, **options):
    """A short training with Lightning in FP16, whose first steps overflow."""
    lightning = pytest.importorskip("lightning.pytorch", reason=WHY)
    from lightning.pytorch.loggers import CSVLogger
    from lightning.pytorch.plugins.precision import MixedPrecision

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = net()
            self.automatic_optimization = optimizers == 1

        def loss(self, batch):
            return nn.functional.mse_loss(self.net(batch[0]).float(), batch[1])

        def training_step(self, batch, index):
            if optimizers == 1:
                return self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()

        def configure_optimizers(self):
            parts = (
                [self.parameters()]
                if optimizers == 1
                else [self.net[0].parameters(), self.net[2].parameters()]
            )
            return [optim.AdamW(part, lr=1e-2) for part in parts]

    plugins = [MixedPrecision("16-mixed", "cpu", scaler=GradScaler("cpu", init_scale=2.0**24))]
    trainer = lightning.Trainer(
        accelerator="cpu",
        plugins=plugins if optimizers == 1 else [],
        max_steps=steps,
        default_root_dir=tmp_path,
        logger=CSVLogger(tmp_path),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
    )
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), batch_size=64)
    trainer.fit(Module(), loader, **options)
    return trainer


def lightnings(**options):
    pytest.importorskip("lightning.pytorch", reason=WHY)
    from fusedamp.numerics.lightning import NumericsCallback

    return NumericsCallback(**options)


def test_lightning(tmp_path):
    """The trainer's logger has a row per due step; the watch is there afterwards."""
    callback = lightnings(every=2)
    trainer = fit(tmp_path, callback)
    trainer.logger.save()
    with open(trainer.logger.experiment.metrics_file_path, newline="") as file:
        logged = [row for row in csv.DictReader(file) if row["numerics/scale"]]
    assert [row["step"] for row in logged] == ["2", "4", "6", "8"]
    assert float(logged[0]["numerics/skipped"]) == 1
    assert float(logged[0]["numerics/scale"]) == 2.0**23
    (watch,) = callback.watches
    assert isinstance(watch, Watch)
    assert "net.0.weight" in watch.table()
    assert [record.step for record in watch.poll()] == [2, 4, 6, 8]


def test_lightning_resumes(tmp_path):
    """Steps count on from the checkpoint's."""
    fit(tmp_path, lightnings(every=2)).save_checkpoint(tmp_path / "last.ckpt")
    memory = Memory()
    fit(
        tmp_path,
        lightnings(every=2, logger=memory),
        steps=12,
        ckpt_path=tmp_path / "last.ckpt",
        weights_only=False,
    )
    assert [step for step, _ in memory.rows] == [10, 12]


def test_lightning_with_two_optimizers(tmp_path):
    memory = Memory()
    callback = lightnings(every=1, logger=memory)
    fit(tmp_path, callback, steps=4, optimizers=2)
    assert len(callback.watches) == 2
    names = {name for _, values in memory.rows for name in values}
    assert {"numerics/optimizer 0/scale", "numerics/optimizer 1/scale"} <= names


def train(tmp_path, callback, steps=8, **options):
    """A short training with the Hugging Face Trainer, whose first steps overflow."""
    transformers = pytest.importorskip("transformers", reason=WHY)
    pytest.importorskip("accelerate", reason=WHY)
    x, y = rows()
    trainer = transformers.Trainer(
        Model(),
        transformers.TrainingArguments(
            str(tmp_path),
            use_cpu=True,
            max_steps=steps,
            save_steps=4,
            per_device_train_batch_size=64,
            max_grad_norm=0.0,
            report_to=[],
            disable_tqdm=True,
            dataloader_pin_memory=False,
        ),
        train_dataset=[{"x": a, "labels": b} for a, b in zip(x, y, strict=True)],
        optimizer_cls_and_kwargs=(optim.AdamW, {"lr": 1e-2}),
        callbacks=[callback],
    )
    trainer.accelerator.scaler = GradScaler("cpu", init_scale=2.0**127)
    trainer.train(**options)
    return trainer


def transformers_callback(**options):
    pytest.importorskip("transformers", reason=WHY)
    from fusedamp.numerics.transformers import NumericsCallback

    return NumericsCallback(**options)


def test_hf_trainer(tmp_path):
    """Records are in the trainer's history, which its checkpoints hold; a resumed run counts on."""
    callback = transformers_callback(every=2)
    trainer = train(tmp_path, callback)
    logged = [row for row in trainer.state.log_history if "numerics/scale" in row]
    assert [row["step"] for row in logged] == [2, 4, 6, 8]
    assert "net.0.weight" in callback.watch.table()
    memory = Memory()
    train(
        tmp_path,
        transformers_callback(every=2, logger=memory),
        steps=12,
        resume_from_checkpoint=str(tmp_path / "checkpoint-8"),
    )
    assert [step for step, _ in memory.rows] == [10, 12]


@pytest.mark.parametrize("name", ["lightning", "transformers"])
def test_what_is_missing_has_a_name(name, monkeypatch):
    for module in (name, f"{name}.pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.delitem(sys.modules, f"fusedamp.numerics.{name}", raising=False)
    with pytest.raises(
        ImportError, match=rf"fusedamp.numerics.{name} needs {name}, .*fusedamp\[integrations\]"
    ):
        importlib.import_module(f"fusedamp.numerics.{name}")


@pytest.mark.parametrize("make", [lightnings, transformers_callback])
def test_a_factory_makes_the_watch(make, tmp_path):
    """With the callback's options, and a model for the names."""
    calls = []

    class Fake:
        def __init__(self, *arguments, **options):
            calls.append((arguments, options))

        def log_to(self, logger):
            logger.log(5, {"numerics/scale": 1.0})

        def remove(self):
            calls.append("removed")

    callback = make(every=3, factory=Fake, logger=(memory := Memory()), history=2)
    (fit if make is lightnings else train)(tmp_path, callback, steps=2)
    (optimizer, scaler), options = calls[0]
    assert type(getattr(optimizer, "optimizer", optimizer)) is optim.AdamW, "the optimizer, or its wrapper"
    assert isinstance(scaler, GradScaler)
    assert options["every"] == 3
    assert options["history"] == 2
    assert isinstance(options["model"], nn.Module)
    assert calls[1:] == ["removed"]
    assert memory.rows == [(5, {"numerics/scale": 1.0})]
