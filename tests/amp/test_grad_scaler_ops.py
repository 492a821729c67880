"""A step of scaler and optimizer runs three fusedamp ops and no torch op; results equal those of separate
calls."""

import math

import pytest
import torch
from fusedamp import GradScaler, optim
from fusedamp.amp.check import Check, CheckByParts
from on_device import DEVICE
from torch.profiler import ProfilerActivity, profile

SCALE = 2.0**10


def make(n=4, dtype=torch.float32, **options):
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(5 + i, dtype=torch.float32).to(dtype)) for i in range(n)]
    groups = [{"params": params[::2]}, {"params": params[1::2], "lr": 0.5}]
    return params, optim.AdamW([group for group in groups if group["params"]], **options)


def give_grads(params, step, dtype=None):
    torch.manual_seed(step + 1)
    for param in params:
        param.grad = (torch.randn(param.shape) * SCALE).to(dtype or param.dtype)


def started(**options):
    scaler = GradScaler(DEVICE, init_scale=SCALE, growth_interval=3, **options)
    scaler.scale(torch.zeros(()))
    return scaler


def iterate(scaler, optimizer, max_norm=None, norm_type=2.0):
    norm = None if max_norm is None else scaler.clip_grad_norm_(optimizer, max_norm, norm_type)
    scaler.step(optimizer)
    scaler.update()
    return norm


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("overflows", [False, True])
def test_three_ops_and_nothing_between_them(clips, overflows):
    """Guards the fixed cost of a small model, on the device and on the host."""
    params, optimizer = make()
    scaler = started(min_scale=1.0)  # so that the scale is not read every time
    for step in range(5):
        give_grads(params, step)
        iterate(scaler, optimizer, 1.0 if clips else None)
    give_grads(params, 9)
    if overflows:
        params[0].grad[0] = math.inf
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        iterate(scaler, optimizer, 1.0 if clips else None)
    names = [event.name for event in seen.events()]
    ours = [name for name in names if name.startswith("fusedamp::")]
    assert ours == ["fusedamp::_check_grads", "fusedamp::_planned_step_", "fusedamp::update_scale_"]
    others = {name for name in names if name.startswith("aten::")}
    assert others <= {"aten::new_empty", "aten::empty", "aten::empty_strided"}  # the results of ours
    assert bool(scaler.last_step_skipped) == overflows


def by_parts(monkeypatch):
    monkeypatch.setattr(optim.AdamW, "_gradient_table", lambda self, versioned: None)


NORMS = [None, 1.0, 1e9, 0.0, math.inf, torch.tensor(2.0), torch.tensor(2.0).double()]


@pytest.mark.parametrize("max_norm", NORMS)
@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_the_same_bits_as_in_parts(monkeypatch, max_norm, norm_type, dtype):
    """Twelve steps with overflows in the first ones and later: weights, norms, scale, report."""
    if max_norm is None and norm_type != 2.0:
        pytest.skip("there is no norm")
    found = []
    for parts in (False, True):
        with monkeypatch.context() as patched:
            if parts:
                by_parts(patched)
            params, optimizer = make(dtype=dtype)
            scaler, seen = started(), []
            for step in range(12):
                give_grads(params, step)
                if step in (0, 5, 8):
                    params[step % 3].grad[step % 5] = math.nan if step == 5 else math.inf
                seen.append(iterate(scaler, optimizer, max_norm, norm_type))
                seen += [scaler._scale.clone(), scaler.last_step_skipped]
            seen += [param.detach() for param in params]
            found.append((seen, str(scaler.overflow_report())))
    for one, two in zip(found[0][0], found[1][0], strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            assert one.dtype == two.dtype
            assert torch.equal(one.nan_to_num(nan=-7.0), two.nan_to_num(nan=-7.0))
    assert found[0][1] == found[1][1]
    assert "step 9 was skipped" in found[0][1]


def warm(**options):
    params, optimizer = make(**options)
    scaler = started()
    for step in range(4):
        give_grads(params, step)
        iterate(scaler, optimizer, 1.0)
    give_grads(params, 4)
    return params, optimizer, scaler


def read_of(scaler, optimizer):
    return scaler._per_optimizer_states[id(optimizer)]["read"]


def change_in_place(params, optimizer, scaler):
    params[1].grad.mul_(3)


def change_object(params, optimizer, scaler):
    params[1].grad = params[1].grad * 3


def change_twice(params, optimizer, scaler):
    for _ in range(2):  # the second one may have the same address
        params[1].grad = None
        params[1].grad = torch.full_like(params[1], SCALE)


def change_scale(params, optimizer, scaler):
    scaler._scale.mul_(2)


def replace_scale(params, optimizer, scaler):
    scaler._scale = scaler._scale * 2


def lose_one(params, optimizer, scaler):
    params[2].grad = None


def become_a_main_grad(params, optimizer, scaler):
    params[2].main_grad, params[2].grad = params[2].grad.float(), None


def overflow(params, optimizer, scaler):
    params[0].grad[0] = math.inf


def clip_again(params, optimizer, scaler):
    scaler.clip_grad_norm_(optimizer, 0.25)


def clip_by_another_norm(params, optimizer, scaler):
    scaler.clip_grad_norm_(optimizer, 0.25, math.inf)


def unscale(params, optimizer, scaler):
    scaler.unscale_(optimizer)


def raise_the_flag(params, optimizer, scaler):
    for flag in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
        flag.fill_(1.0)


def replace_the_flag(params, optimizer, scaler):
    flags = scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    for device in flags:
        flags[device] = torch.ones(())


def skip_by_hand(params, optimizer, scaler):
    optimizer.found_inf = torch.ones(())


def divide_by_hand(params, optimizer, scaler):
    optimizer.grad_scale = 4.0


def new_rate(params, optimizer, scaler):
    optimizer.param_groups[0]["lr"] = 0.125


def touch_the_state(params, optimizer, scaler):
    optimizer.state[params[0]]["exp_avg"].fill_(1.0)


def nothing(params, optimizer, scaler):
    pass


CHANGES = [
    nothing, change_in_place, change_object, change_twice, change_scale, replace_scale, lose_one,
    become_a_main_grad, overflow, clip_again, clip_by_another_norm, unscale, raise_the_flag, replace_the_flag,
    skip_by_hand, divide_by_hand, new_rate, touch_the_state,
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("first", [True, False])
def test_what_changes_between_clipping_and_the_step(monkeypatch, change, first):
    """Guards that a check is used only while it holds: the same as where nothing is remembered."""
    results = []
    for parts in (False, True):
        with monkeypatch.context() as patched:
            params, optimizer, scaler = warm()
            if parts:
                by_parts(patched)
            norm = scaler.clip_grad_norm_(optimizer, 1.0)
            assert isinstance(read_of(scaler, optimizer), CheckByParts if parts else Check)
            change(params, optimizer, scaler)
            scaler.step(optimizer)
            scaler.update()
            results.append([norm, scaler._scale, scaler.last_step_skipped, *(p.detach() for p in params)])
            assert not vars(optimizer).keys() & {"found_inf", "grad_scale"}
    for one, two in zip(*results, strict=True):
        assert torch.equal(one, two)


def test_clipping_keeps_gradients_only_until_the_step():
    _, optimizer, scaler = warm()
    scaler.clip_grad_norm_(optimizer, 1.0)
    assert read_of(scaler, optimizer).grads is not None
    scaler.step(optimizer)
    assert read_of(scaler, optimizer) is None


@pytest.mark.parametrize("name", ["_check_inf_per_device", "unscale_", "_unscale_grads_"])
def test_replaced_methods_are_called(name):
    _, optimizer, scaler = warm()
    original, calls = getattr(scaler, name), []
    setattr(scaler, name, lambda *args, **kwargs: calls.append(name) or original(*args, **kwargs))
    scaler.step(optimizer)
    assert calls


def test_norms_and_flags_outlive_the_step():
    params, optimizer, scaler = warm()
    norms, skipped = [], []
    for step in range(3):
        give_grads(params, step)
        if step == 1:
            params[0].grad[0] = math.inf
        norms.append(iterate(scaler, optimizer, 1.0))
        skipped.append(scaler.last_step_skipped)
    assert [bool(flag) for flag in skipped] == [False, True, False]
    assert [math.isfinite(norm) for norm in norms] == [True, False, True]
    assert norms[0] != norms[2]
