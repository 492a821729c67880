"""Accelerate on 2 gloo ranks: accumulation, clipping, schedule, saved state, our scaler, which all obey."""

import tempfile
from functools import partial

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from ranks import agreed, rank, spawned
from torch import nn
from trainers import LR, STEPS, WHY, as_torchrun, close, equal, net, rows, weights

pytest.importorskip("accelerate", reason=WHY)
pytestmark = [pytest.mark.integration, pytest.mark.host, pytest.mark.filterwarnings("ignore")]
TOO_LARGE = 2.0**127  # any gradient above 2 overflows FP32


class Training:
    """A net, an optimizer and a schedule, prepared; ``parts`` micro-batches per step."""

    def __init__(self, make, parts=1, scaler=None):
        from accelerate import Accelerator
        from accelerate.state import AcceleratorState

        as_torchrun()
        AcceleratorState._reset_state(True)
        self.accelerator = Accelerator(cpu=True, gradient_accumulation_steps=parts)
        self.accelerator.scaler = scaler
        self.parts, model = parts, net()
        self.raw = make(model.parameters(), lr=LR)
        schedule = torch.optim.lr_scheduler.ExponentialLR(self.raw, 0.9)
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*rows()), batch_size=4)
        prepared = self.accelerator.prepare(model, self.raw, schedule, loader)
        self.model, self.optimizer, self.schedule, self.loader = prepared
        self.skipped = 0

    def train(self, first, last):
        batches = list(self.loader)  # 8 of this rank
        for step in range(first, last):
            for part in range(self.parts):
                x, y = batches[(self.parts * step + part) % len(batches)]
                self.accelerator.gradient_state._set_sync_gradients(part == self.parts - 1)
                self.accelerator.backward(nn.functional.mse_loss(self.model(x), y))
            if self.accelerator.scaler is None:
                self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
            before = weights(self.model)
            self.optimizer.step()
            self.schedule.step()
            self.optimizer.zero_grad()
            skipped = agreed(self.optimizer.step_was_skipped)
            assert skipped == all(map(torch.equal, before, weights(self.model)))
            self.skipped += skipped
        return weights(self.model)


def as_torch(parts):
    close(*(Training(make, parts).train(0, STEPS) for make in (optim.AdamW, torch.optim.AdamW)))


def resumes():
    def make(params, lr):
        return optim.AdamW(params, lr=lr, state_dtype="int8", rounding_seed=3)

    folder = [tempfile.mkdtemp()]
    torch.distributed.broadcast_object_list(folder)
    training = Training(make, 2)
    training.train(0, 3)
    training.accelerator.save_state(folder[0])
    straight = training.train(3, 6)
    again = Training(make, 2)
    again.accelerator.load_state(folder[0])
    equal(again.train(3, 6), straight)


def scaled(grouped):
    """An overflow skips the step and the schedule of all ranks; the same as with torch's optimizer."""
    ends = []
    for make in (optim.AdamW, torch.optim.AdamW):
        group = torch.distributed.group.WORLD if grouped else None
        training = Training(make, scaler=GradScaler("cpu", init_scale=TOO_LARGE, process_group=group))
        ends.append(training.train(0, 12))
        assert 0 < training.skipped < 10
        assert agreed(training.accelerator.scaler.get_scale()) == TOO_LARGE / 2**training.skipped
        assert training.raw.param_groups[0]["lr"] == pytest.approx(LR * 0.9 ** (2 * (12 - training.skipped)))
    close(*ends, steps=12)


def one_bad_replica():
    """One rank's gradients are NaN after the reduction: with the group, all skip."""
    scaler = GradScaler("cpu", init_scale=1.0, process_group=torch.distributed.group.WORLD)
    training = Training(optim.AdamW, scaler=scaler)
    before = weights(training.model)
    for p in training.model.parameters():
        p.grad = torch.full_like(p, float("nan") if rank() else 1.0)
    scaler.scale(torch.ones(()))
    training.optimizer.step()
    assert agreed(training.optimizer.step_was_skipped)
    equal(weights(training.model), before)


def patched():
    """Under patch_torch, Accelerate makes our scaler where it hard-codes torch's."""
    from accelerate.utils import GradScalerKwargs
    from accelerate.utils.modeling import get_grad_scaler

    with fusedamp.patch_torch():
        scaler = get_grad_scaler(None, **GradScalerKwargs(init_scale=TOO_LARGE).to_kwargs())
    assert type(scaler) is GradScaler


SCENARIOS = {
    2: {
        "ddp": partial(as_torch, 1),
        "accumulation": partial(as_torch, 2),
        "resumes": resumes,
        "scaled": partial(scaled, False),
        "scaled, group": partial(scaled, True),
        "bad replica": one_bad_replica,
        "patched": patched,
    }
}
ranks, test_on_ranks = spawned(SCENARIOS)
