"""Clipping: the drop-in function against torch's, the scaler's deferred one against unscale_ and torch's."""

import math
import warnings

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from fusedamp.amp import clip
from on_device import DEVICE

NORMS = [1.0, 1.5, 2.0, 3.0, math.inf, "inf"]
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Norm and coefficient are FP64 here, and torch's at least FP32 for the FP32 and FP64 cases: up to
# log2(n) + 4 roundings in torch's sum, root and quotient.
ROUNDINGS = 32


def params_of(dtypes, seed=0, factor=1.0):
    generator = torch.Generator().manual_seed(seed)
    params = []
    for i, dtype in enumerate(dtypes):
        grad = (torch.randn(7, i + 3, generator=generator) * factor).to(dtype)
        params.append(torch.zeros_like(grad).requires_grad_())
        params[-1].grad = grad
    return params


def exact_norm(params, norm_type):
    return torch.cat([p.grad.double().flatten() for p in params]).norm(float(norm_type))


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.0, 0.5, 1e6, math.inf, torch.tensor(0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_as_torchs(norm_type, max_norm, dtype):
    ours, theirs = params_of([dtype] * 3), params_of([dtype] * 3)
    norm = fusedamp.clip_grad_norm_(ours, max_norm, norm_type)
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm, norm_type)
    eps = ROUNDINGS * torch.finfo(dtype).eps
    assert norm.dtype is dtype
    torch.testing.assert_close(norm, expected, rtol=eps, atol=0)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=eps, atol=0, equal_nan=True)


@pytest.mark.parametrize("norm_type", NORMS)
def test_mixed_dtypes(norm_type):
    params = params_of(DTYPES)
    before = [p.grad.clone() for p in params]
    expected = exact_norm(params, norm_type)
    norm = fusedamp.clip_grad_norm_(params, 0.5, norm_type)
    assert norm.dtype is torch.float64
    # Of an FP32 gradient or a narrower one, each |g|^p may be rounded to FP32 before it is added.
    assert norm.item() == pytest.approx(expected.item(), rel=torch.finfo(torch.float32).eps)
    for p, b in zip(params, before, strict=True):
        # One rounding to the gradient's dtype, and that of the coefficient to FP32.
        eps = torch.finfo(p.dtype).eps if p.dtype != torch.float64 else ROUNDINGS * torch.finfo(p.dtype).eps
        wanted = b.double() * (0.5 / (norm + 1e-6))
        tiny = torch.finfo(p.dtype).smallest_normal * torch.finfo(p.dtype).eps
        assert ((p.grad.double() - wanted).abs() <= wanted.abs() * eps + tiny).all()


def test_fp16_does_not_overflow_its_norm():
    """torch's FP16 norm of 300 x 300 is inf, so it clips everything to 0."""
    (param,) = params_of([torch.float16])
    param.grad = torch.full_like(param, 300.0)
    norm = fusedamp.clip_grad_norm_(param, 1.0)
    assert norm.dtype is torch.float32
    assert norm.item() == pytest.approx(300 * math.sqrt(param.numel()))
    assert torch.linalg.vector_norm(param.grad.float()).item() == pytest.approx(1.0, rel=1e-3)


def test_norm_0_counts_elements():
    params = params_of([torch.float32] * 2)
    params[0].grad.zero_()
    assert fusedamp.clip_grad_norm_(params, math.inf, 0).item() == params[1].numel()


def test_sparse_complex_and_gaps():
    sparse = torch.eye(2).to_sparse()[0] * 3
    cases = {
        2.0: math.sqrt(9 + 25 + 2),
        math.inf: 5.0,
        1.0: 3 + 5 + 2,
    }
    for norm_type, expected in cases.items():
        grads = [sparse.clone(), torch.tensor([3 + 4j]), torch.ones(4)[::2]]
        params = [torch.zeros_like(g if not g.is_sparse else torch.zeros(2)).requires_grad_() for g in grads]
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        norm = fusedamp.clip_grad_norm_(params, expected / 2, norm_type)
        assert norm.item() == pytest.approx(expected)
        assert params[0].grad.to_dense()[0].item() == pytest.approx(1.5, rel=1e-5)
        assert params[1].grad.item() == pytest.approx(1.5 + 2j, rel=1e-5)
        assert grads[2].tolist() == pytest.approx([0.5, 0.5], rel=1e-5)


def test_without_gradients():
    param = torch.ones(2, requires_grad=True)
    for nothing in (param, [param], []):
        assert fusedamp.clip_grad_norm_(nothing, 1.0) == torch.tensor(0.0)
    with pytest.warns(UserWarning, match="`parameters` is an empty generator"):
        fusedamp.clip_grad_norm_((p for p in []), 1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusedamp.clip_grad_norm_((p for p in params_of([torch.float32])), 1.0)


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_nonfinite(bad):
    (param,) = params_of([torch.float32])
    param.grad[0, 0] = bad
    before = param.grad.clone()
    with pytest.raises(
        RuntimeError, match=r"The total norm of order 2.0 for gradients from `parameters` is non-finite"
    ):
        fusedamp.clip_grad_norm_(param, 1.0, error_if_nonfinite=True)
    assert torch.equal(param.grad.nan_to_num(), before.nan_to_num())
    assert not fusedamp.clip_grad_norm_(param, 1.0).isfinite()


BAD = [
    ({"max_norm": -1.0}, r"max_norm is -1.0; expected a number >= 0"),
    ({"max_norm": math.nan}, r"max_norm is nan"),
    ({"max_norm": torch.ones(2)}, r"max_norm is a torch.float32 tensor of shape \[2\]; expected a number"),
    ({"max_norm": 1.0, "norm_type": -1.0}, r"norm_type is -1.0; expected a number >= 0, or inf"),
    ({"max_norm": 1.0, "norm_type": math.nan}, r"norm_type is nan"),
]


@pytest.mark.parametrize(("arguments", "match"), BAD)
def test_bad_arguments(arguments, match):
    (param,) = params_of([torch.float32])
    before = param.grad.clone()
    with pytest.raises((ValueError, TypeError), match=r"^\[clip_grad_norm_\] " + match):
        fusedamp.clip_grad_norm_(param, **arguments)
    scaler = GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(torch.ones(()))
    with pytest.raises((ValueError, TypeError), match=r"^\[GradScaler.clip_grad_norm_\] " + match):
        scaler.clip_grad_norm_(optim.AdamW([param]), **arguments)
    assert torch.equal(param.grad, before)


def scaled_world(cls, dtypes, **options):
    params = params_of(dtypes, factor=4.0)
    scaler = GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(torch.ones(()))
    return params, cls(params, lr=0.1, **options), scaler


@pytest.mark.parametrize("norm_type", NORMS)
@pytest.mark.parametrize("max_norm", [0.5, 1e6, torch.tensor([0.5])])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("cls", [optim.SGD, torch.optim.SGD])
def test_scaler_as_unscale_and_torchs_clip(norm_type, max_norm, unscale_first, cls):
    """The weights of SGD without momentum show the clipped gradient itself."""
    params, optimizer, scaler = scaled_world(cls, [torch.float32] * 3)
    expected, reference, theirs = scaled_world(torch.optim.SGD, [torch.float32] * 3)
    if unscale_first:
        scaler.unscale_(optimizer)
    norm = scaler.clip_grad_norm_(optimizer, max_norm, norm_type)
    scaler.step(optimizer)
    theirs.unscale_(reference)
    wanted = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type)
    theirs.step(reference)
    eps = ROUNDINGS * torch.finfo(torch.float32).eps
    torch.testing.assert_close(norm, wanted, rtol=eps, atol=0)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p, q, rtol=2 * eps, atol=0)


def test_clipping_twice_composes_and_an_unscale_afterwards_does_it():
    """Deferred clips act on one another as in-place ones; unscale_ then leaves what these would."""
    params, optimizer, scaler = scaled_world(optim.SGD, [torch.float32] * 3)
    expected, reference, theirs = scaled_world(torch.optim.SGD, [torch.float32] * 3)
    theirs.unscale_(reference)
    for max_norm, norm_type in ((2.0, 2.0), (0.1, math.inf), (0.5, 2.0)):
        norm = scaler.clip_grad_norm_(optimizer, max_norm, norm_type)
        wanted = torch.nn.utils.clip_grad_norm_(expected, max_norm, norm_type)
        torch.testing.assert_close(norm, wanted, rtol=1e-5, atol=0)
    scaler.unscale_(optimizer)
    for p, q in zip(params, expected, strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-5, atol=0)


def test_max_norm_tensor_is_not_read_by_the_host(monkeypatch):
    """float(max_norm) hides a sync. On the CPU there is none to see, so reading is forbidden."""
    _, optimizer, scaler = scaled_world(optim.SGD, [torch.float32])
    max_norm = torch.tensor(0.5)

    def refuse(self):
        raise AssertionError("the host read a tensor")

    for name in ("item", "__float__", "__bool__", "tolist"):
        monkeypatch.setattr(torch.Tensor, name, refuse)
    norm = scaler.clip_grad_norm_(optimizer, max_norm)
    scaler.step(optimizer)
    monkeypatch.undo()
    assert norm.item() > 0.5


def test_overflow_and_clip():
    """An inf norm makes the coefficient 0 and 0 x inf NaN; the flag keeps all that from the weights."""
    params, optimizer, scaler = scaled_world(optim.AdamW, DTYPES)
    params[0].grad[0, 0] = math.inf
    assert scaler.clip_grad_norm_(optimizer, 1.0).isinf()
    scaler.step(optimizer)
    assert all((p == 0).all() for p in params)
    assert scaler.last_step_skipped


def test_without_any_gradient_the_scaler_returns_0():
    params, optimizer, scaler = scaled_world(optim.AdamW, [torch.float32])
    params[0].grad = None
    assert scaler.clip_grad_norm_(optimizer, 1.0).item() == 0
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("norm_type", [2.0, 1.0, math.inf, 3.0, 0.0])
@pytest.mark.parametrize("max_norm", [1.0, 1e9, math.inf, 10**400, torch.tensor(2.0), torch.tensor(2)])
@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_two_ops_give_the_bits_of_the_parts(monkeypatch, norm_type, max_norm, bad):
    """Guards the shortcut of plain gradients: norm and gradients equal those of separate operations."""
    results = []
    for parts in (False, True):
        with monkeypatch.context() as patched:
            if parts:
                patched.setattr(clip, "_clip_at_once", lambda *args: None)
            params = [torch.nn.Parameter(torch.ones(n)) for n in (3, 700, 1)]
            params[1].data = params[1].data.bfloat16()
            torch.manual_seed(0)
            for param in params:
                param.grad = torch.randn(param.shape).to(param.dtype) + bad * (param.numel() == 3)
            norm = fusedamp.clip_grad_norm_(params, max_norm, norm_type)
            results.append([norm, *(param.grad for param in params)])
    for one, two in zip(*results, strict=True):
        assert one.dtype == two.dtype
        assert torch.equal(one.nan_to_num(nan=-7.0), two.nan_to_num(nan=-7.0))
