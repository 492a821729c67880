"""`optimizer.found_inf` and `optimizer.grad_scale` set by hand are obeyed, as torch's fused optimizers do."""

import math

import pytest
import torch
from cases import CASES, COMPOSED, bits, make_params, set_grads
from fusedamp import GradScaler, optim
from on_device import DEVICE

SCALE = 1024.0
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


class Watched(optim.SGD):
    """Takes the ordinary route."""

    def step(self, closure=None):
        return super().step(closure)


class Legacy(optim.SGD):
    """Takes the scaler, as torch allowed once."""

    _step_supports_amp_scaling = True

    def step(self, closure=None, grad_scaler=None):
        if grad_scaler is not None:
            grad_scaler.unscale_(self)
        return super().step(closure)


def torch_fused(params, lr):
    return torch.optim.SGD(params, lr=lr, fused=True)


OURS = pytest.mark.parametrize("kind", [optim.SGD, Watched, Legacy], ids=lambda k: k.__name__)
OBEY = pytest.mark.parametrize("kind", [optim.SGD, Watched, torch_fused], ids=lambda k: k.__name__)
FLAGS = [1, 2.0, True, math.nan, torch.tensor(1.0), torch.tensor([3]), torch.tensor(True)]
NO_FLAGS = [0, 0.0, False, None, torch.tensor(0.0), torch.zeros(1, 1, dtype=torch.int32)]
pytestmark = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself")


def one(kind, grad=1.0, lr=1.0, dtype=torch.float32):
    param = torch.zeros(1, dtype=dtype, requires_grad=True)
    param.grad = torch.full_like(param, grad)
    return param, kind([param], lr=lr)


def started(**options):
    scaler = GradScaler(DEVICE, init_scale=SCALE, **options)
    scaler.scale(torch.ones(()))
    return scaler


# Without a scaler -------------------------------------------------------------------------------------------


@OURS
@pytest.mark.parametrize("dtype", DTYPES)
def test_found_inf(kind, dtype):
    for value in FLAGS:
        param, optimizer = one(kind, dtype=dtype)
        optimizer.found_inf = value
        optimizer.step()
        assert param.item() == 0, value
        assert optimizer.found_inf is value, "without a scaler it stays, as in torch"
    for value in NO_FLAGS:
        param, optimizer = one(kind, dtype=dtype)
        optimizer.found_inf = value
        optimizer.step()
        assert param.item() == -1, value


@OURS
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [8, 8.0, torch.tensor(8.0), torch.tensor([8], dtype=torch.int64)])
def test_grad_scale(kind, value, dtype):
    param, optimizer = one(kind, grad=2.0, dtype=dtype)
    optimizer.grad_scale = value
    optimizer.step()
    assert param.item() == -0.25


def test_grad_scale_as_torchs_fused_sgd():
    results = []
    for kind in (optim.SGD, torch_fused):
        param, optimizer = one(kind)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(10.0), torch.tensor(0.0)
        optimizer.step()
        results.append(param.item())
    assert results == pytest.approx([-0.1, -0.1], rel=1e-6)


@pytest.mark.parametrize("case", CASES + COMPOSED, ids=str)
def test_every_optimizer_in_first_later_and_replayed_steps(case):
    """The flag changes no bit; the factor gives what gradients divided beforehand do."""
    params, wanted = ([p for dtype in DTYPES for p in make_params(dtype)] for _ in range(2))
    optimizer, expected = case.ours(params, **case.options), case.ours(wanted, **case.options)

    def everything(made):
        groups, state = made.param_groups, made.state
        tensors = [p for group in groups for p in group["params"]]
        return [bits(t) for p in tensors for t in (p, *state.get(p, {}).values())]

    for step in range(5):
        set_grads(wanted, step)
        set_grads(params, step)
        for param in params:
            param.grad.mul_(4.0)
        before = everything(optimizer)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), 4.0
        optimizer.step()
        after = everything(optimizer)
        assert after == before or step == 0  # which makes the states
        optimizer.found_inf = 0
        optimizer.step()
        expected.step()
        assert everything(optimizer) == everything(expected)


BAD = [
    ("found_inf", "yes", TypeError, r"\[SGD\.step\] found_inf is 'yes'; expected .* 1 element: 0 to step"),
    ("found_inf", torch.zeros(2), TypeError, r"found_inf is a torch\.float32 tensor of shape \[2\]"),
    ("found_inf", torch.zeros(1, dtype=torch.complex64), TypeError, "complex64"),
    ("grad_scale", [1.0], TypeError, r"grad_scale is \[1\.0\]; expected a finite real number"),
    ("grad_scale", torch.zeros(0), TypeError, r"shape \[0\]"),
    ("grad_scale", torch.ones(1).to_sparse(), TypeError, "grad_scale is a torch.float32 tensor"),
    ("grad_scale", 0, ValueError, r"grad_scale is 0; expected a finite real number .*, not 0\. Set such"),
    ("grad_scale", 1e-39, ValueError, "1e-39"),
    ("grad_scale", 1e39, ValueError, "1e[+]39"),
    ("grad_scale", math.nan, ValueError, "nan"),
    ("grad_scale", math.inf, ValueError, "inf"),
]


@pytest.mark.parametrize("route", ["no scaler", "fused", "ordinary"])
@pytest.mark.parametrize(("name", "value", "error", "text"), BAD)
def test_unusable_ones_are_refused_before_anything_changes(name, value, error, text, route):
    kind = type("SGD", (Watched,), {}) if route == "ordinary" else optim.SGD
    first, other = (torch.zeros(1, requires_grad=True) for _ in range(2))
    optimizer = kind([{"params": [first]}, {"params": [other]}], lr=1.0)
    first.grad, other.grad = torch.ones(1), torch.ones(1)
    setattr(optimizer, name, value)
    step, scaler = optimizer.step, started()
    with pytest.raises(error, match=text):
        step() if route == "no scaler" else scaler.step(optimizer)
    assert (first.item(), other.item(), first.grad.item()) == (0, 0, 1)
    assert getattr(optimizer, name) is value
    delattr(optimizer, name)
    step() if route == "no scaler" else scaler.step(optimizer)
    assert first.item() < 0


# With a scaler ----------------------------------------------------------------------------------------------


@OBEY
@pytest.mark.parametrize("unscale_first", [False, True])
def test_the_factor_multiplies_the_scale(kind, unscale_first):
    results = []
    for scaler in (started(), torch.amp.GradScaler(DEVICE, init_scale=SCALE)):
        param, optimizer = one(torch_fused if type(scaler) is torch.amp.GradScaler else kind, 2 * SCALE)
        scaler.scale(torch.ones(()))
        if unscale_first:
            scaler.unscale_(optimizer)
        optimizer.grad_scale = torch.tensor(4.0)
        scaler.step(optimizer)
        assert kind is Watched or not hasattr(optimizer, "grad_scale"), "it holds for one step"
        results.append(param.item())
    assert results == [-0.5, -0.5]


@OBEY
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("value", FLAGS)
def test_found_inf_skips_and_is_no_overflow(kind, value, unscale_first):
    scaler, (param, optimizer) = started(), one(kind, SCALE)
    if unscale_first:
        scaler.unscale_(optimizer)
    optimizer.found_inf = value
    scaler.step(optimizer)
    assert param.item() == 0
    assert scaler.last_step_skipped
    assert kind is Watched or not hasattr(optimizer, "found_inf")
    assert not scaler.overflow_report()
    scaler.update()
    assert scaler.get_scale() == SCALE
    vars(optimizer).pop("found_inf", None)
    param.grad.fill_(SCALE)
    scaler.step(optimizer)
    assert param.item() == -1
    assert not scaler.last_step_skipped


@OBEY
def test_an_overflow_skips_whatever_is_set(kind):
    scaler, (param, optimizer) = started(), one(kind, math.inf)
    optimizer.found_inf = torch.tensor(0.0)
    scaler.step(optimizer)
    assert param.item() == 0
    assert scaler.last_step_skipped
    scaler.update()
    assert scaler.get_scale() == SCALE / 2


@OBEY
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize(
    "factor", [2.0**-100, torch.tensor(2.0**-100), torch.tensor(0.0), torch.tensor(math.nan)]
)
def test_a_gradient_that_the_factor_makes_infinite_is_an_overflow(kind, factor, unscale_first):
    scaler, (param, optimizer) = started(), one(kind, 2.0**30 * SCALE)
    if unscale_first:
        scaler.unscale_(optimizer)
    optimizer.grad_scale = factor
    scaler.step(optimizer)
    assert param.item() == 0
    assert scaler.last_step_skipped
    if kind is not Watched:
        assert "1 too large once unscaled" in str(scaler.overflow_report())
    scaler.update()
    assert scaler.get_scale() == SCALE / 2


@OBEY
def test_clipping_comes_before_the_factor(kind):
    """As unscale_, clip_grad_norm_ and torch's fused step: the norm is that of the unscaled gradients, and
    gradients that clipping makes small enough do not overflow."""
    scaler, (param, optimizer) = started(), one(kind, 2.0**30 * SCALE, lr=2.0**-100)
    optimizer.grad_scale = 2.0**-100
    assert scaler.clip_grad_norm_(optimizer, 1.0) == 2.0**30
    scaler.step(optimizer)
    assert not scaler.last_step_skipped
    assert param.item() == pytest.approx(-1.0, rel=1e-6)


def test_a_legacy_step_obeys_too():
    scaler, (param, optimizer) = started(), one(Legacy, 2 * SCALE)
    optimizer.grad_scale = 4.0
    scaler.step(optimizer)
    assert param.item() == -0.5
    scaler.update()
    optimizer.found_inf = 1
    param.grad.fill_(SCALE)
    scaler.step(optimizer)
    assert param.item() == -0.5


def test_under_torchs_scaler():
    scaler, (param, optimizer) = torch.amp.GradScaler(DEVICE, init_scale=SCALE), one(optim.SGD, 2 * SCALE)
    scaler.scale(torch.ones(()))
    optimizer.grad_scale = 4.0
    scaler.step(optimizer)
    assert param.item() == -0.5


@OBEY
def test_they_stay_where_the_step_raises(kind):
    scaler, optimizer = started(), one(kind, SCALE)[1]
    optimizer.grad_scale = factor = torch.tensor(4.0)

    def refuse(*args):
        raise KeyError("hook")

    handle = optimizer.register_step_post_hook(refuse)
    with pytest.raises(KeyError):
        scaler.step(optimizer)
    assert optimizer.grad_scale is factor
    assert not hasattr(optimizer, "found_inf")
    handle.remove()
