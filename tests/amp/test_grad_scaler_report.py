"""Overflow reports: parameters, counts, steps, and cost of recording."""

import gc
import math

import pytest
import torch
from fusedamp import GradScaler, Overflow, OverflowReport, optim
from fusedamp.amp.gradients import Gradients
from fusedamp.amp.overflow import OverflowLog, params_of
from on_device import DEVICE, HERE
from torch.utils.weak import TensorWeakRef


def make(cls=optim.AdamW, names=True, scale=8.0):
    params = {"body.weight": torch.ones(2, 3), "head.bias": torch.ones(4), "late": torch.ones(1)}
    params = {name: p.requires_grad_() for name, p in params.items()}
    optimizer = cls(list(params.items()) if names else list(params.values()), lr=0.1)
    scaler = GradScaler(DEVICE, init_scale=scale)
    scaler.scale(torch.ones(()))
    return params, scaler, optimizer


def iterate(params, scaler, optimizer, unscale=False, **bad):
    for name, param in params.items():
        param.grad = torch.ones_like(param)
        if name == "late" and "late" not in bad:
            param.grad = None
    for name, values in bad.items():
        grad = params[name.replace("_", ".")].grad.view(-1)
        grad[: len(values)] = torch.tensor(values)
    if unscale:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    scaler.update()


def test_nothing_known():
    params, scaler, optimizer = make()
    assert scaler.overflow_report() == OverflowReport(0, ())
    assert not scaler.overflow_report(optimizer)
    iterate(params, scaler, optimizer)
    assert not scaler.overflow_report()
    assert str(scaler.overflow_report()) == "no overflow recorded"


ROUTES = [(optim.AdamW, False), (optim.AdamW, True), (torch.optim.AdamW, False), (torch.optim.AdamW, True)]


@pytest.mark.parametrize(("cls", "unscale"), ROUTES)
def test_names_kinds_and_step(cls, unscale):
    params, scaler, optimizer = make(cls)
    iterate(params, scaler, optimizer, unscale)
    iterate(
        params, scaler, optimizer, unscale, body_weight=[math.inf, -math.inf, math.nan], head_bias=[math.nan]
    )
    if unscale and DEVICE != "cpu":
        scaler.overflow_report()  # counts what is gone after the next backward
    for _ in range(3):  # good steps do not wipe it out
        iterate(params, scaler, optimizer, unscale)
    report = scaler.overflow_report()
    assert report == OverflowReport(
        2, (Overflow("body.weight", (2, 3), 2, 1, 0), Overflow("head.bias", (4,), 0, 1, 0))
    )
    assert str(report) == ("step 2 was skipped:\n  body.weight [2, 3]: 2 inf, 1 NaN\n  head.bias [4]: 1 NaN")
    assert scaler.overflow_report(optimizer) == report


def test_overflow_after_unscaling_is_told_apart():
    params, scaler, optimizer = make(scale=2.0**-20)
    iterate(params, scaler, optimizer, head_bias=[1e38, math.inf])
    (entry,) = scaler.overflow_report().overflows
    assert (entry.parameter, entry.inf, entry.nan, entry.unscaled) == ("head.bias", 1, 0, 1)
    assert "1 too large once unscaled" in str(scaler.overflow_report())


def test_the_latest_of_changing_sets_of_gradients():
    params, scaler, optimizer = make()
    iterate(params, scaler, optimizer, late=[math.inf])
    iterate(params, scaler, optimizer)
    assert [o.parameter for o in scaler.overflow_report().overflows] == ["late"]
    iterate(params, scaler, optimizer, head_bias=[math.nan])
    assert scaler.overflow_report().step == 3
    assert [o.parameter for o in scaler.overflow_report().overflows] == ["head.bias"]


def test_without_names_the_place_is_told():
    params, scaler, optimizer = make(names=False)
    optimizer.add_param_group({"params": [extra := torch.ones(1, requires_grad=True)]})
    extra.grad = torch.full((1,), math.inf)
    iterate(params, scaler, optimizer, head_bias=[math.inf])
    assert [o.parameter for o in scaler.overflow_report().overflows] == [
        "AdamW group 0 parameter 1", "AdamW group 1 parameter 0",
    ]  # fmt: skip


def test_of_each_optimizer():
    first, second = make(), make()
    scaler = first[1]
    iterate(first[0], scaler, first[2], head_bias=[math.inf])
    iterate(second[0], scaler, second[2])
    assert scaler.overflow_report(first[2]).step == 1
    assert not scaler.overflow_report(second[2])
    assert scaler.overflow_report().step == 1


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_gradients_are_not_kept_alive(clip, unscale):
    """zero_grad must free them: the next forward needs the memory."""
    params, scaler, optimizer = make()
    params["head.bias"].grad = torch.ones(4)
    if clip:
        scaler.clip_grad_norm_(optimizer, 1.0)
    iterate(params, scaler, optimizer, unscale, body_weight=[math.inf])
    grads = [TensorWeakRef(p.grad) for p in params.values() if p.grad is not None]
    optimizer.zero_grad()
    gc.collect()
    assert [ref() for ref in grads] == [None, None]


def test_a_report_dies_with_its_optimizer():
    params, scaler, optimizer = make()
    iterate(params, scaler, optimizer, body_weight=[math.inf])
    del optimizer
    gc.collect()
    assert not scaler.overflow_report()


@pytest.mark.parametrize("cleared", [False, True])
def test_gradients_unscaled_on_a_device_are_counted_when_asked(cleared):
    """If reading the flag would sync, an explicit unscale_ leaves counting to the report."""
    params, _, optimizer = make()
    params["head.bias"].grad = torch.tensor([1.0, math.inf, math.nan, 1.0])
    log = OverflowLog(optimizer, HERE)
    for flag in (0.0, 1.0):
        log.next_step()
        log.record_uncounted(Gradients(params_of(optimizer)), torch.tensor(flag))
    if cleared:
        optimizer.zero_grad()
        assert str(log.report()) == "step 2 was skipped:\n  by no gradient that still exists on this rank"
    else:
        assert log.report() == OverflowReport(2, (Overflow("head.bias", (4,), 1, 1, 0),))


def test_last_step_skipped_is_a_bool_tensor_and_follows_each_step():
    params, scaler, optimizer = make()
    assert scaler.last_step_skipped.dtype is torch.bool
    for value, skipped in ((1.0, False), (math.nan, True), (1.0, False)):
        iterate(params, scaler, optimizer, head_bias=[value])
        assert scaler.last_step_skipped.shape == ()
        assert scaler.last_step_skipped.item() is skipped
