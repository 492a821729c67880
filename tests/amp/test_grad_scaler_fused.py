"""The fused route: gradients only read, the step told everything, all or nothing."""

import copy
import math

import pytest
import torch
from fusedamp import GradScaler, ops, optim
from on_device import DEVICE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
OPTIMIZERS = [
    lambda p: optim.AdamW(p, lr=0.1),
    lambda p: optim.Adam(p, lr=0.1, amsgrad=True),
    lambda p: optim.SGD(p, lr=0.1, momentum=0.9),
]


def make(make_optimizer=OPTIMIZERS[0], dtypes=DTYPES, scale=4.0, **options):
    """Parameters of several dtypes in two groups; returns them with scaler and optimizer."""
    generator = torch.Generator().manual_seed(1)
    params = [torch.randn(5, 3, generator=generator).to(d).requires_grad_() for d in dtypes]
    optimizer = make_optimizer([{"params": params[:2]}, {"params": params[2:], "lr": 0.05}])
    scaler = GradScaler(DEVICE, init_scale=scale, growth_interval=100, **options)
    scaler.scale(torch.ones(()))
    return params, optimizer, scaler


def fill(params, value=1.0, scale=4.0):
    for i, param in enumerate(params):
        param.grad = torch.full_like(param, value * (i + 1) * scale)


def everything(params, optimizer):
    """Bits of all parameters and of all state, wherever it is kept."""
    tensors = [p.detach() for p in params]
    for state in optimizer.state_dict()["state"].values():
        tensors += [v for _, v in sorted(state.items()) if isinstance(v, torch.Tensor)]
    return [t.clone() for t in tensors]


def same(ours, theirs):
    return len(ours) == len(theirs) and all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_step_is_unscale_and_step_bit_for_bit_and_leaves_gradients_scaled(make_optimizer):
    results = []
    for unscale_first in (False, True):
        params, optimizer, scaler = make(make_optimizer)
        for _ in range(3):
            fill(params)
            scaled = [p.grad.clone() for p in params]
            if unscale_first:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
            if not unscale_first:
                assert same([p.grad for p in params], scaled)
        results.append(everything(params, optimizer))
    assert same(*results)


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("culprit", range(4))
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_skipped_step_changes_nothing_bit_for_bit(make_optimizer, unscale_first, culprit, bad):
    """All or nothing over groups and dtypes, wherever the one bad element is."""
    params, optimizer, scaler = make(make_optimizer)
    fill(params)
    scaler.step(optimizer)
    scaler.update()
    before = everything(params, optimizer)
    fill(params)
    params[culprit].grad[4, 2] = bad
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert scaler.last_step_skipped.item()
    scaler.update()
    assert same(everything(params, optimizer), before)
    assert scaler.get_scale() == 2.0


@pytest.mark.parametrize("make_optimizer", OPTIMIZERS)
def test_first_step_overflow_leaves_no_trace(make_optimizer):
    """The normal case with a large initial scale: no uninitialized buffer, no step counted."""
    finals = []
    for overflow_first in (False, True):
        params, optimizer, scaler = make(make_optimizer)
        if overflow_first:
            fill(params, math.inf)
            scaler.step(optimizer)
            scaler.update(4.0)
        for _ in range(2):
            fill(params)
            scaler.step(optimizer)
            scaler.update()
        finals.append(everything(params, optimizer))
    assert same(*finals)


def test_overflow_made_by_unscaling_skips():
    """FP32 gradients that are finite only while scaled; torch applies them as inf."""
    params, optimizer, scaler = make(dtypes=[torch.float32, torch.float32, torch.float32], scale=2.0**-10)
    fill(params, scale=1e38)
    before = [p.detach().clone() for p in params]
    scaler.step(optimizer)
    assert scaler.last_step_skipped
    assert same([p.detach() for p in params], before)


def test_one_read_pass_for_clip_and_step(monkeypatch):
    calls = []
    real = ops._grad_stats
    monkeypatch.setattr(ops, "_grad_stats", lambda *args: calls.append(args) or real(*args))
    params, optimizer, scaler = make()
    fill(params)
    scaler.clip_grad_norm_(optimizer, 1.0)
    scaler.clip_grad_norm_(optimizer, 0.5)
    scaler.step(optimizer)
    assert len(calls) == 1


CHANGES = {
    "in place": lambda params, scaler: params[0].grad.mul_(4),
    "replaced": lambda params, scaler: setattr(params[0], "grad", params[0].grad * 4),
    "accumulated": lambda params, scaler: (params[0] * 12).sum().backward(),
    "removed": lambda params, scaler: setattr(params[3], "grad", None),
    "scale written": lambda params, scaler: scaler._scale.mul_(2),
    "scale replaced": lambda params, scaler: setattr(scaler, "_scale", torch.tensor(8.0)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("then_unscale", [False, True])
def test_gradients_that_change_after_clipping_are_read_and_clipped_anew(change, then_unscale):
    """Stepped gradients never exceed max_norm, and a later overflow is detected."""
    results = []
    for change_first in (True, False):
        params, optimizer, scaler = make(lambda p: optim.SGD(p, lr=1.0), dtypes=[torch.float32] * 4)
        fill(params)
        if change_first:
            CHANGES[change](params, scaler)
        scaler.clip_grad_norm_(optimizer, 0.5)
        if not change_first:
            CHANGES[change](params, scaler)
        if then_unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        results.append(everything(params, optimizer))
    assert same(*results)
    params, optimizer, scaler = make()
    fill(params)
    scaler.clip_grad_norm_(optimizer, 0.5)
    params[2].grad[0, 0] = math.nan
    scaler.step(optimizer)
    assert scaler.last_step_skipped


@pytest.mark.parametrize("route", ["fused", "unscale first"])
def test_an_optimizer_without_gradients_is_no_error(route):
    """nerfstudio#1919: the scale stays as it was; what another optimizer found counts as ever."""
    _, optimizer, scaler = make()
    calls = []
    optimizer.register_step_post_hook(lambda *args: calls.append(1))
    state = scaler.state_dict()
    if route != "fused":
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert calls == [1]
    assert not scaler.last_step_skipped
    scaler.update()
    assert scaler.state_dict() == state
    others, other, _ = make()
    fill(others, math.inf)
    scaler.step(optimizer)
    scaler.step(other)
    scaler.update()
    assert scaler.get_scale() == 2.0


def test_a_parameter_without_gradient_is_left_alone():
    params, optimizer, scaler = make()
    fill(params)
    params[1].grad = None
    before = params[1].detach().clone()
    scaler.step(optimizer)
    assert torch.equal(params[1], before)
    assert not torch.equal(params[0], before.to(params[0].dtype))


def test_main_grad_is_checked_and_stepped():
    """FP32 buffers that trainers accumulate into: an overflow in one must not slip through."""
    params, optimizer, scaler = make()
    fill(params)
    params[0].grad, params[0].main_grad = None, torch.full((5, 3), 4.0)
    before = params[0].detach().clone()
    scaler.step(optimizer)
    assert not torch.equal(params[0], before)
    scaler.update()
    params[0].main_grad[0, 0] = math.inf
    before = params[0].detach().clone()
    scaler.step(optimizer)
    assert scaler.last_step_skipped
    assert torch.equal(params[0], before)


def test_closures():
    params, optimizer, scaler = make()
    fill(params)
    with pytest.raises(RuntimeError, match="Closure use is not currently supported"):
        scaler.step(optimizer, lambda: 1.0)  # it would make new gradients after the check
    scaler.step(optimizer, None)  # Accelerate passes None


def test_an_exception_in_step_leaves_nothing_behind():
    params, optimizer, scaler = make()
    fill(params)

    def refuse(*args):
        raise KeyError("hook")

    hook = optimizer.register_step_pre_hook(refuse)
    with pytest.raises(KeyError):
        scaler.step(optimizer)
    assert optimizer._amp is None
    hook.remove()
    before = params[0].detach().clone()
    scaler.step(optimizer)  # still allowed, and still told the scale
    assert not torch.equal(params[0], before)


def test_lr_scheduler_keeps_the_fused_route_and_a_replaced_step_does_not():
    params, optimizer, scaler = make()
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 1.0)
    fill(params)
    scaler.step(optimizer)
    assert params[0].grad[0, 0] == 4, "the fused route leaves gradients scaled"
    schedule.step()
    scaler.update()
    calls, step = [], optimizer.step
    optimizer.step = lambda *args, **kwargs: calls.append(1) or step(*args, **kwargs)
    fill(params)
    scaler.step(optimizer)
    assert params[0].grad[0, 0] == 1, "the ordinary route unscales them"
    scaler.update()
    fill(params, math.nan)
    scaler.step(optimizer)
    assert calls == [1], "a replaced step is not called for a skipped step: Accelerate counts calls"


def test_a_wrapper_that_forwards_attributes_gets_the_ordinary_route():
    class Wrapper(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

        def step(self):
            self.inner.step()

    params, optimizer, scaler = make()
    reference, plain, other = make()
    fill(params), fill(reference)
    scaler.step(Wrapper(optimizer))
    other.step(plain)
    assert same(everything(params, optimizer), everything(reference, plain))


def test_deepcopy_of_the_optimizer_is_fused_too():
    _, optimizer, scaler = make()
    twin = copy.deepcopy(optimizer)
    for group in twin.param_groups:
        fill(group["params"])
    scaler.step(twin)
    assert twin.param_groups[0]["params"][0].grad[0, 0] == 4


@pytest.fixture
def default_dtype_fp64():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


@pytest.mark.parametrize("cls", [optim.SGD, torch.optim.SGD])
def test_another_default_dtype(default_dtype_fp64, cls):
    """The flags and the scale are FP32 whatever new tensors are by default."""
    params, optimizer, scaler = make(lambda p: cls(p, lr=0.1))
    if cls is optim.SGD:
        scaler.step(optimizer)  # nothing has a gradient
        scaler.update(4.0)
    fill(params)
    assert scaler.clip_grad_norm_(optimizer, 1.0) > 1
    scaler.step(optimizer)
    scaler.update()
    assert scaler._scale.dtype is torch.float32
    assert not scaler.last_step_skipped
