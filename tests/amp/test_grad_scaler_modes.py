"""Gradients and scalers that inference mode or FakeTensorMode made."""

import contextlib
import math

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from on_device import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode, is_fake

SCALE = 4.0
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Watched(optim.SGD):
    """Takes the ordinary route."""

    def step(self, closure=None):
        return super().step(closure)


def torch_fused(params, lr):
    return torch.optim.SGD(params, lr=lr, fused=True)


KINDS = pytest.mark.parametrize(
    "kind", [optim.SGD, Watched, torch.optim.SGD, torch_fused], ids=lambda k: k.__name__
)
TAILS = {
    "step": lambda scaler, optimizer: None,
    "unscale": lambda scaler, optimizer: scaler.unscale_(optimizer),
    "clip": lambda scaler, optimizer: scaler.clip_grad_norm_(optimizer, 0.5),
    "unscale, clip": lambda scaler, optimizer: (
        scaler.unscale_(optimizer),
        fusedamp.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5),
    ),
}


def gradient(dtype, value, gaps):
    made = torch.full((6,), value * SCALE, dtype=dtype)
    return made[::2] if gaps else made[:3].clone()


@pytest.mark.host
@KINDS
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("inside", [False, True, "at first"])
@pytest.mark.parametrize("gaps", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_inference_gradients_step_as_ordinary_ones(kind, tail, inside, gaps, dtype):
    """Also if the first step, or each, is inside the mode; with overflows."""
    ends = []
    for inference in (False, True):
        param = torch.ones(3, dtype=dtype, requires_grad=True)
        scaler = GradScaler(DEVICE, init_scale=SCALE, growth_interval=100, hysteresis=2)
        optimizer = kind([param], lr=0.25)
        for step, value in enumerate((1.0, 2.0, math.inf, 1.0, math.nan, 1.0)):
            mode = inference and (inside is True or (inside == "at first" and step in (0, 2)))
            with torch.inference_mode() if inference else contextlib.nullcontext():
                grad = gradient(dtype, value, gaps)
                if mode:
                    scaler.scale(torch.ones(()))
            scaler.scale(torch.ones(()))
            param.grad = grad
            with torch.inference_mode() if mode else contextlib.nullcontext():
                TAILS[tail](scaler, optimizer)
                scaler.step(optimizer)
                scaler.update()
        ends.append((param.tolist(), scaler.state_dict(), str(scaler.overflow_report())))
    assert ends[0] == ends[1]
    assert ends[0][0][0] < 1


def test_what_a_scaler_makes_in_inference_mode_can_be_written_outside():
    param = torch.ones(1, requires_grad=True)
    scaler, optimizer = GradScaler(DEVICE, hysteresis=2), optim.SGD([param], lr=1.0)
    with torch.inference_mode():
        scaler.scale(torch.ones(()))
        param.grad = torch.ones(1)
        scaler.unscale_(optimizer)
    flags = list(scaler._found_inf_per_device(optimizer).values())
    assert not any(t.is_inference() for t in (scaler._scale, scaler._growth_tracker, *flags))
    flags[0].fill_(1.0)  # as ranks reduce it
    scaler.step(optimizer)
    assert param.item() == 1
    scaler.update()
    scaler.update(8.0)
    assert scaler.get_scale() == 8


@pytest.mark.host
def test_an_inference_gradient_that_changes_after_clipping_is_read_and_clipped_anew():
    """No version counter tells."""
    param = torch.ones(1, requires_grad=True)
    scaler, optimizer = GradScaler(DEVICE, init_scale=SCALE), optim.SGD([param], lr=1.0)
    scaler.scale(torch.ones(()))
    for value, left in ((8.0, 0.5), (math.inf, 1.0)):
        with torch.inference_mode():
            param.grad = torch.full((1,), SCALE)
        scaler.clip_grad_norm_(optimizer, 0.5)
        with torch.inference_mode():
            param.grad.fill_(value)
        with torch.no_grad():
            param.fill_(1.0)
        scaler.step(optimizer)
        assert param.item() == pytest.approx(left, abs=1e-6)
        scaler.update()


def fake_kinds():
    for name in ("SGD", "AdamW", "Adam", "RMSprop"):
        yield lambda p, name=name: getattr(torch.optim, name)(p, lr=0.1)
    yield lambda p: torch.optim.SGD(p, lr=0.1, fused=True)
    yield lambda p: torch.optim.AdamW(p, lr=0.1, fused=True)


@pytest.mark.host
@pytest.mark.parametrize("make", list(fake_kinds()))
@pytest.mark.parametrize("tail", TAILS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_fake_tensors(make, tail, dtype):
    """Without values, every step counts as a good one, and nothing waits for a value."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3, dtype=dtype))
        scaler, optimizer = GradScaler("cpu", init_scale=SCALE, hysteresis=2), make([param])
        calls = []
        optimizer.register_step_post_hook(lambda *_: calls.append(1))
        for _ in range(3):
            scaler.scale(param.float().sum()).backward()
            TAILS[tail](scaler, optimizer)
            scaler.step(optimizer)
            assert is_fake(scaler.last_step_skipped)
            scaler.update()
        assert len(calls) == 3
        scaler.update(8.0)
        assert is_fake(scaler._scale)


@pytest.mark.host
def test_fusedamps_optimizers_are_read_in_fake_mode():
    """The scaler's half: scale, unscale_, norm and update."""
    with FakeTensorMode():
        param = torch.nn.Parameter(torch.ones(3))
        scaler, optimizer = GradScaler("cpu"), optim.AdamW([param])
        scaler.scale(param.sum()).backward()
        assert is_fake(scaler.clip_grad_norm_(optimizer, 1.0))
        scaler.unscale_(optimizer)
        scaler.update()
