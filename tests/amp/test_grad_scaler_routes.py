"""Code between the scaler and a step: wrappers, subclasses, hooks and replaced steps see unscaled, clipped
gradients and a real skip.
"""

import functools
import math
import types

import pytest
import torch
from fusedamp import optim
from torch.optim.lr_scheduler import LambdaLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from wrappers import KINDS, SCALE, Own, gradients, started, weight

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def wrapper(kind, params):
    made = Own(kind(params, lr=0.1))
    return made, made.seen


def looking_subclass(kind, params):
    seen = []

    class Looking(kind):
        def step(self, closure=None):
            seen.extend(gradients(self))
            return super().step(closure)

    return Looking(params, lr=0.1), seen


def driving_subclass(kind, params):
    """Another optimizer, of no step size, takes the same gradients first."""
    seen = []

    class Driving(kind):
        def step(self, closure=None):
            seen.extend(gradients(self))
            torch.optim.SGD(self.param_groups[0]["params"], lr=0.0).step()
            return super().step(closure)

    return Driving(params, lr=0.1), seen


def pre_hook(kind, params):
    seen, made = [], kind(params, lr=0.1)
    made.register_step_pre_hook(lambda o, *_: seen.extend(gradients(o)))
    return made, seen


def patched_class(kind, params):
    """Whatever the new function says of itself."""
    seen, ready = [], type("Ready", (kind,), {})
    ready(params, lr=0.1)
    before = ready.step

    @functools.wraps(before)
    def step(self, *args):
        seen.extend(gradients(self))
        return before(self, *args)

    ready.step = step
    return ready(params, lr=0.1), seen


def hooks_inside(kind, params):
    """The class is patched first; torch then puts its hooks around the new function."""
    seen, ready = [], type("Ready", (kind,), {})

    @functools.wraps(kind.step)
    def step(self, *args):
        seen.extend(gradients(self))
        return kind.step(self, *args)

    step.__dict__.pop("hooked", None)
    ready.step = step
    return ready(params, lr=0.1), seen


def replaced_step(kind, params):
    seen, made = [], kind(params, lr=0.1)
    before = made.step
    made.step = lambda *args: seen.extend(gradients(made)) or before(*args)
    return made, seen


def replaced_method_and_schedule(kind, params):
    seen, made = [], kind(params, lr=0.1)
    before = made.step

    @functools.wraps(before)
    def step(self, *args):
        seen.extend(gradients(self))
        return before(*args)

    made.step = types.MethodType(step, made)
    LambdaLR(made, lambda epoch: 1.0)
    return made, seen


def decorated_schedule(kind, params):
    """functools.wraps copies the mark of the LR scheduler's counter."""
    seen, made = [], kind(params, lr=0.1)
    LambdaLR(made, lambda epoch: 1.0)
    before = made.step

    @functools.wraps(before)
    def step(*args):
        seen.extend(gradients(made))
        return before(*args)

    made.step = step
    return made, seen


def step_of_another(kind, params):
    """An optimizer with the step of another object."""
    made, other = kind(params, lr=0.0), kind(params, lr=0.1)
    made.step = other.step
    return made, None


def scheduled_step_of_another(kind, params):
    made, other = kind(params, lr=0.0), kind(params, lr=0.1)
    LambdaLR(other, lambda epoch: 1.0)
    made.step, made.kept = other.step, other
    return made, None


BETWEEN = [
    wrapper,
    looking_subclass,
    driving_subclass,
    pre_hook,
    patched_class,
    hooks_inside,
    replaced_step,
    replaced_method_and_schedule,
    decorated_schedule,
    step_of_another,
    scheduled_step_of_another,
]
each_between = pytest.mark.parametrize("between", BETWEEN, ids=lambda f: f.__name__)


@KINDS
@each_between
@pytest.mark.parametrize("dtype", DTYPES)
def test_weight_and_gradient_are_right(kind, between, dtype):
    param, scaler = weight(dtype), started()
    optimizer, seen = between(kind, [param])
    scaler.step(optimizer)
    assert param.item() == torch.tensor(0.8).to(dtype).item()
    assert seen in (None, [2.0])
    assert not scaler.last_step_skipped
    scaler.update()
    assert scaler.get_scale() == SCALE


@KINDS
@each_between
def test_clipping_is_kept(kind, between):
    param, scaler = weight(torch.float32), started()
    optimizer, seen = between(kind, [param])
    assert scaler.clip_grad_norm_(optimizer, 1.0) == 2
    scaler.step(optimizer)
    assert param.item() == pytest.approx(0.9, abs=1e-6)
    assert seen is None or seen == pytest.approx([1.0], abs=1e-6)


@KINDS
@each_between
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_an_overflow_is_a_real_skip(kind, between, bad):
    """Nothing that could read the gradients is called."""
    param, scaler = weight(torch.float32, bad), started()
    optimizer, seen = between(kind, [param])
    assert scaler.step(optimizer) is None
    assert param.item() == 1
    assert not seen
    assert scaler.last_step_skipped
    scaler.update()
    assert scaler.get_scale() == SCALE / 2


def test_adamw_in_a_wrapper_survives_an_overflow():
    param, scaler = weight(torch.float32, math.inf), started()
    optimizer = Own(optim.AdamW([param], lr=0.1))
    scaler.step(optimizer)
    assert param.item() == 1
    assert not optimizer.state


@KINDS
@pytest.mark.parametrize("schedule", [False, True])
def test_global_pre_hooks(kind, schedule):
    param, scaler, seen = weight(torch.float32), started(), []
    optimizer = kind([param], lr=0.1)
    if schedule:
        LambdaLR(optimizer, lambda epoch: 1.0)
    handle = register_optimizer_step_pre_hook(lambda o, *_: seen.extend(gradients(o)))
    try:
        scaler.step(optimizer)
        scaler.update()
        assert (param.item(), seen) == (pytest.approx(0.8), [2.0])
        param.grad.fill_(math.inf)
        scaler.step(optimizer)
        assert (param.item(), seen) == (pytest.approx(0.8), [2.0])
    finally:
        handle.remove()


def test_a_hook_put_on_between_clipping_and_step():
    """The clipping that was put off is done, and the hook sees its result."""
    param, scaler, seen = weight(torch.float32), started(), []
    optimizer = optim.SGD([param], lr=0.1)
    scaler.clip_grad_norm_(optimizer, 1.0)
    optimizer.register_step_pre_hook(lambda o, *_: seen.extend(gradients(o)))
    scaler.step(optimizer)
    assert seen == pytest.approx([1.0], abs=1e-6)
    assert param.item() == pytest.approx(0.9, abs=1e-6)


def test_a_hook_and_no_gradients_is_no_error():
    param, scaler = torch.ones(1, requires_grad=True), started()
    optimizer, seen = pre_hook(optim.SGD, [param])
    param.grad, calls = None, []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer.register_step_pre_hook(lambda *_: seen.append(0))
    scaler.step(optimizer)
    scaler.update()
    assert (calls, seen) == ([1], [0])
    assert scaler.state_dict()["_growth_tracker"] == 0


@pytest.mark.parametrize("schedule", [False, True])
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.LAMB, optim.Muon])
def test_own_steps_take_the_fused_route(kind, schedule):
    """Also with post-hooks, in plain subclasses and under an LR scheduler: gradients stay scaled."""
    param, scaler = torch.ones(2, 2, requires_grad=True), started()
    optimizer = type("Plain", (kind,), {"extra": 1})([param], lr=0.1)
    if schedule:
        LambdaLR(optimizer, lambda epoch: 1.0)
    seen = []
    optimizer.register_step_post_hook(lambda o, *_: seen.extend(gradients(o)))
    param.grad = torch.full_like(param, 2 * SCALE)
    scaler.step(optimizer)
    assert seen == [2 * SCALE]
    assert param.mean() < 1
