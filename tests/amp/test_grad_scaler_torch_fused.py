"""torch's own fused optimizers under our scaler: none of the defects they have under torch's."""

import copy
import math
import warnings

import pytest
import torch
from fusedamp import GradScaler
from on_device import DEVICE

FUSED = [
    lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    lambda p: torch.optim.Adam(p, lr=0.1, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, fused=True),
    lambda p: torch.optim.SGD(p, lr=0.1, fused=True),
    lambda p: torch.optim.Adagrad(p, lr=0.1, fused=True),  # takes no overflow flag in torch 2.11
]


def takes_a_flag(make_optimizer):
    try:
        return make_optimizer([torch.ones(1)])._step_supports_amp_scaling
    except (RuntimeError, AttributeError):  # no fused step on this device; no flag
        return False


FUSED = list(filter(takes_a_flag, FUSED))
each_fused = pytest.mark.parametrize("make_optimizer", FUSED)


def make(make_optimizer, scaler_class=GradScaler):
    params = [torch.ones(3, requires_grad=True), torch.full((2,), 2.0, requires_grad=True)]
    scaler = scaler_class(DEVICE, init_scale=8.0)
    scaler.scale(torch.ones(()))
    return params, scaler, make_optimizer(params)


def iterate(params, scaler, optimizer, value=1.0):
    for param in params:
        param.grad = torch.full_like(param, value) * scaler._scale
    result = scaler.step(optimizer)
    scaler.update()
    return result


def state_of(params, optimizer):
    state = copy.deepcopy(optimizer.state_dict()["state"])
    return [p.detach().clone() for p in params], [
        v for entry in state.values() for _, v in sorted(entry.items()) if isinstance(v, torch.Tensor)
    ]


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert len(a) == len(b)
        for x, y in zip(a, b, strict=True):
            assert torch.equal(x, y)


@each_fused
@pytest.mark.parametrize("outcomes", ["...", ".x.", "..x.."])
def test_as_under_torchs_scaler(make_optimizer, outcomes):
    worlds = [make(make_optimizer, cls) for cls in (GradScaler, torch.amp.GradScaler)]
    for outcome in outcomes:
        for world in worlds:
            iterate(*world, math.nan if outcome == "x" else 1.0)
    assert_same(*(state_of(params, optimizer) for params, _, optimizer in worlds))
    assert worlds[0][1].state_dict() == worlds[1][1].state_dict()


@each_fused
def test_first_step_overflow_leaves_no_trace(make_optimizer):
    """torch's fused SGD makes its buffers uninitialized, and uses them next: weights of 2.5e30."""
    overflowed, clean = make(make_optimizer), make(make_optimizer)
    for _ in range(3):
        iterate(*overflowed, math.inf)
    overflowed[1].update(8.0)
    for _ in range(3):
        iterate(*overflowed)
        iterate(*clean)
    assert_same(*(state_of(params, optimizer) for params, _, optimizer in (overflowed, clean)))


def test_late_parameter_of_fused_sgd_overflows_first():
    """One parameter has its buffer, the other would get an uninitialized one."""
    params, scaler, optimizer = make(FUSED[2])
    late = params.pop()
    iterate(params, scaler, optimizer)
    late.grad = torch.full_like(late, math.inf)
    iterate(params, scaler, optimizer)
    assert optimizer.state[late].get("momentum_buffer") is None
    assert torch.equal(late, torch.full((2,), 2.0))


def test_its_own_step_is_called_with_the_flag_once_it_has_buffers():
    params, scaler, optimizer = make(FUSED[2])
    calls = []
    optimizer.register_step_post_hook(
        lambda o, *_: calls.append([float(getattr(o, name, -1)) for name in ("found_inf", "grad_scale")])
    )
    for value in (1.0, 1.0, math.inf):
        iterate(params, scaler, optimizer, value)
    assert calls == [[-1.0, -1.0], [0.0, 8.0], [1.0, 8.0]]


@each_fused
def test_attributes_do_not_leak_from_a_step_that_raises(make_optimizer):
    params, scaler, optimizer = make(make_optimizer)
    iterate(params, scaler, optimizer)

    def refuse(*args):
        raise KeyError("hook")

    optimizer.register_step_post_hook(refuse)
    with pytest.raises(KeyError):
        iterate(params, scaler, optimizer)
    assert not hasattr(optimizer, "grad_scale")
    assert not hasattr(optimizer, "found_inf")


def test_a_grad_scale_of_the_user_multiplies():
    results = []
    for cls in (GradScaler, torch.amp.GradScaler):
        params, scaler, optimizer = make(FUSED[3], cls)
        for param in params:
            param.grad = torch.full_like(param, 32.0)
        optimizer.grad_scale = torch.tensor(4.0)
        scaler.step(optimizer)
        results.append(params[0].detach())
    assert torch.equal(*results)
    assert torch.equal(results[0], torch.full((3,), 0.9))


def test_overflow_made_by_unscaling():
    params, scaler, optimizer = make(FUSED[0])
    scaler.update(2.0**-20)
    for param in params:
        param.grad = torch.full_like(param, 1e38)
    scaler.step(optimizer)
    assert scaler.last_step_skipped
    assert torch.equal(params[0], torch.ones(3))


def test_fp16_gradients_and_clipping():
    """Impossible with torch: unscale_ refuses FP16 gradients, and clipping needs it."""
    params = [torch.ones(3, dtype=torch.float16, requires_grad=True)]
    scaler = GradScaler(DEVICE, init_scale=8.0)
    scaler.scale(torch.ones(()))
    params[0].grad = torch.full((3,), 8.0, dtype=torch.float16)
    optimizer = FUSED[3](params)
    norm = scaler.clip_grad_norm_(optimizer, 0.5)
    assert norm.item() == pytest.approx(math.sqrt(3))
    scaler.step(optimizer)
    step = 0.1 * 0.5 / math.sqrt(3)
    assert params[0].tolist() == pytest.approx([1 - step] * 3, abs=2 * torch.finfo(torch.float16).eps)


@each_fused
def test_no_gradients_is_no_error(make_optimizer):
    _, scaler, optimizer = make(make_optimizer)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.state_dict()["_growth_tracker"] == 0


def test_a_step_that_takes_the_scaler_still_gets_it():
    class Legacy(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            self.got = grad_scaler
            grad_scaler.unscale_(self)
            return "stepped"

    params, scaler, optimizer = make(lambda p: Legacy(p, lr=0.1))
    with pytest.warns(FutureWarning, match="GradScaler is going to stop passing itself"):
        assert iterate(params, scaler, optimizer) == "stepped"
    assert optimizer.got is scaler


@each_fused
def test_no_warning(make_optimizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        iterate(*make(make_optimizer))


@each_fused
def test_a_flag_that_ranks_summed_skips_too(make_optimizer):
    """torch's fused kernels skip at exactly 1; a SUM over ranks makes 2 of the flag between unscale_ and
    step."""
    params, scaler, optimizer = make(make_optimizer)
    iterate(params, scaler, optimizer)
    before = state_of(params, optimizer)
    for param in params:
        param.grad = torch.ones_like(param)
    scaler.unscale_(optimizer)
    for flag in scaler._found_inf_per_device(optimizer).values():
        flag.fill_(2.0)
    scaler.step(optimizer)
    assert_same(before, state_of(params, optimizer))
    assert scaler.last_step_skipped
