"""fusedamp.nn against float64: forward and all gradients, in every mode; where it is torch's, to the bit.

Guards: products with FP32 sums, gradients in the promised dtype, batch dimensions, layouts, non-finite
values.
"""

import copy

import fusedamp
import pytest
import torch
import torch.nn.functional as F
from fusedamp.nn import functional
from linear_reference import Exact, after_gelu, before_gelu, gelu, gelu_slope, product, rounded, row_sums
from on_device import DEVICE

HALF = [torch.float16, torch.bfloat16]
SHAPES = [
    ((7,), 5, 3),
    ((2, 3), 1, 9),
    ((1,), 65, 64),
    ((), 12, 10),
    ((257,), 31, 33),
    ((4, 1, 5), 127, 1),
    ((8,), 256, 300),
]


def random_layer(batch, k, n, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(shape, generator=random)  # noqa: E731
    x = make(*batch, k).to(dtype).requires_grad_()
    weight = torch.nn.Parameter(make(n, k).to(dtype))
    bias = torch.nn.Parameter(make(n).to(dtype))
    return x, weight, bias, make(*batch, n)


def is_made_by(function, y):
    """True if ``y`` or what it is a view of comes from this function."""
    nodes = (y.grad_fn, *(node for node, _ in y.grad_fn.next_functions))
    return any(function in type(node).__name__ for node in nodes)


def flat(t):
    return t.reshape(-1, t.shape[-1])


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fp32_weights_under_autocast(shape, dtype, with_bias):
    x, weight, bias, dy = random_layer(*shape)
    bias = bias if with_bias else None
    with torch.autocast(DEVICE, dtype=dtype):
        y = functional.linear(x, weight, bias)
    assert y.dtype is dtype
    y.backward(dy.to(dtype))
    x16, w16, dy16 = x.detach().to(dtype), weight.detach().to(dtype), dy.to(dtype)
    b16 = None if bias is None else bias.detach().to(dtype)
    product(flat(x16), w16.t(), b16).check(flat(y.detach()), "forward")
    assert x.grad.dtype is torch.float32
    rounded(product(flat(dy16), w16), dtype).check(flat(x.grad), "input grad")
    assert weight.grad.dtype is torch.float32
    product(flat(dy16).t(), flat(x16)).check(weight.grad, "weight grad")
    if bias is not None:
        row_sums(flat(dy16)).check(bias.grad, "bias grad")


@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_16_bit_weights(shape, dtype, grad_dtype):
    x, weight, bias, dy = random_layer(*shape, dtype)
    if grad_dtype is not None:
        weight.grad_dtype = bias.grad_dtype = grad_dtype
    y = functional.linear(x, weight, bias)
    y.backward(dy.to(dtype))
    wanted = grad_dtype or dtype
    product(flat(x.detach()), weight.detach().t(), bias.detach()).check(flat(y.detach()), "forward")
    assert (x.grad.dtype, weight.grad.dtype, bias.grad.dtype) == (dtype, wanted, wanted)
    dy = flat(dy.to(dtype))
    product(dy, weight.detach()).check(flat(x.grad), "input grad")
    product(dy.t(), flat(x.detach())).check(weight.grad, "weight grad")
    if grad_dtype is not None:
        row_sums(dy).check(bias.grad, "bias grad")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_fp32_and_fp64_are_torchs(dtype):
    """The same function, so that TF32 switches, double backward and gradcheck are torch's."""
    x, weight, bias, dy = random_layer((5,), 6, 4, dtype)
    results = []
    for linear in (functional.linear, F.linear):
        y = linear(x, weight, bias)
        assert type(y.grad_fn).__name__ == "AddmmBackward0"
        results.append((y, *torch.autograd.grad(y, (x, weight, bias), dy.to(dtype))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_gradcheck():
    x, weight, bias, _ = random_layer((2, 3), 4, 5, torch.float64)
    for f in (functional.linear, functional.linear_gelu):
        assert torch.autograd.gradcheck(f, (x, weight, bias))
        assert torch.autograd.gradgradcheck(f, (x, weight, bias))
    w2, b2 = (torch.randn(s, dtype=torch.float64).requires_grad_() for s in ((3, 5), (3,)))
    for activation in ("gelu_tanh", "relu"):
        assert torch.autograd.gradcheck(
            lambda *a, activation=activation: functional.mlp(*a, activation=activation),
            (x, weight, bias, w2, b2),
        )


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_autocast_leaves_fp64_alone(dtype):
    x, weight, bias, _ = random_layer((5,), 6, 4, torch.float64)
    with torch.autocast(DEVICE, dtype=dtype):
        assert functional.linear(x, weight, bias).dtype is torch.float64


def test_autocast_decides_the_dtype():
    """Also of 16-bit inputs and weights of the other dtype; a region that is off decides nothing."""
    x, weight, bias, _ = random_layer((5,), 6, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = functional.linear(x.half(), weight, bias)
        assert y.dtype is torch.bfloat16
        with torch.autocast(DEVICE, enabled=False):
            assert functional.linear(x, weight, bias).dtype is torch.float32
        y.sum().backward()  # within the region
    assert weight.grad.dtype is torch.float32
    product(torch.ones(4, 5).bfloat16(), x.detach().half().bfloat16()).check(weight.grad, "weight grad")
    with torch.autocast("cuda" if DEVICE == "cpu" else "cpu", dtype=torch.bfloat16):  # another device's
        assert functional.linear(x, weight, bias).dtype is torch.float32


def test_a_bias_alone():
    """An FP32 bias of a frozen weight has an FP32 sum as well."""
    bias = torch.nn.Parameter(torch.ones(1))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        functional.linear(torch.ones(257, 2), torch.ones(1, 2), bias).sum().backward()
    assert bias.grad.item() == 257.0


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_later_gradients_of_16_bit_weights(dtype):
    """They are added to 16-bit .grad by torch."""
    x, weight, bias, dy = random_layer((5,), 6, 4, dtype)
    for _ in range(3):
        functional.linear(x, weight, bias).backward(dy.to(dtype))
    assert weight.grad.dtype is bias.grad.dtype is dtype
    once = product(dy.to(dtype).t(), x.detach())
    allowed = 3 * once.bound + 3 * 3 * once.value.abs() * torch.finfo(dtype).eps
    assert ((weight.grad.double() - 3 * once.value).abs() <= allowed + 1e-6).all()


@pytest.mark.parametrize("frozen", ["x", "weight", "bias", "all"])
def test_frozen_tensors_get_no_gradient(frozen):
    x, weight, bias, dy = random_layer((5,), 6, 4)
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        t.requires_grad_(frozen not in (name, "all"))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = functional.linear(x, weight, bias)
    assert y.requires_grad == (frozen != "all")
    if frozen == "all":
        return
    y.backward(dy.bfloat16())
    for name, t in (("x", x), ("weight", weight), ("bias", bias)):
        assert (t.grad is None) == (frozen == name)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_no_grad_is_torchs(dtype):
    """Autocast's cache of casts serves generation loops."""
    x, weight, bias, _ = random_layer((5,), 6, 4)
    with torch.no_grad(), torch.autocast(DEVICE, dtype=dtype):
        y = functional.linear(x, weight, bias)
    assert not y.requires_grad
    product(x.detach().to(dtype), weight.detach().to(dtype).t(), bias.detach().to(dtype)).check(y, "forward")
    with torch.inference_mode(), torch.autocast(DEVICE, dtype=dtype):
        assert torch.equal(functional.linear(x, weight, bias), y)


def test_a_cast_in_autocasts_cache_keeps_its_gradient():
    """A product without a graph must not leave a cast there that another user of the weight takes."""
    x, weight, bias, _ = random_layer((5,), 6, 4)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        functional.linear(x, weight, bias)
        F.linear(x, weight).sum().backward()
    assert weight.grad is not None


def test_a_weight_that_is_no_leaf():
    """FP32: its gradient stays FP32 on the way to the leaf. 16 bits: as torch's."""
    x, weight, bias, dy = random_layer((257,), 2, 1)
    with torch.no_grad():
        x.fill_(1.0)
        dy.fill_(1.0)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        functional.linear(x, weight * 1.0, bias).backward(dy.bfloat16())
    assert torch.equal(weight.grad, torch.full((1, 2), 257.0))
    half = weight.detach().bfloat16().requires_grad_()
    functional.linear(x.detach().bfloat16(), half * 1.0).backward(dy.bfloat16())
    assert torch.equal(half.grad, torch.full((1, 2), 256.0).bfloat16())


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_non_finite_values_reach_a_scaler(bad):
    x, weight, bias, dy = random_layer((6,), 5, 4)
    dy[2, 1] = bad
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = functional.linear(x, weight, bias)
    y.backward(dy.half())
    assert not weight.grad[1].isfinite().any()
    assert not bias.grad[1].isfinite()
    assert weight.grad[0].isfinite().all()
    assert not x.grad[2].isfinite().any()


def test_gradients_beyond_fp16():
    """FP16 ends at 65504; the sum of 100 rows of 1000 does not."""
    x = torch.full((100, 2), 100.0)
    weight = torch.nn.Parameter(torch.ones(3, 2))
    with torch.autocast(DEVICE, dtype=torch.float16):
        y = functional.linear(x, weight)
    y.backward(torch.full((100, 3), 1000.0).half())
    assert torch.equal(weight.grad, torch.full((3, 2), 1e7))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", ["transposed", "expanded", "every second", "off by one"])
def test_layouts(layout, dtype):
    """Of input and output gradient."""
    arrange = {
        "transposed": lambda t: t.t().contiguous().t(),
        "expanded": lambda t: t[:1].expand(t.shape),
        "every second": lambda t: torch.stack([t, t], -1).flatten(-2)[:, ::2],
        "off by one": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    }[layout]
    x, weight, bias, dy = random_layer((9,), 6, 4)
    x, dy = arrange(x.detach()).requires_grad_(), arrange(dy.to(dtype))
    with torch.autocast(DEVICE, dtype=dtype):
        y = functional.linear(x, weight, bias)
    y.backward(dy)
    product(dy.t(), x.detach().to(dtype)).check(weight.grad, "weight grad")
    rounded(product(dy, weight.detach().to(dtype)), dtype).check(x.grad, "input grad")


@pytest.mark.parametrize("batch", [(0,), (2, 0, 3)], ids=str)
def test_empty_batch(batch):
    """Zeros, and an accumulated gradient that is not touched."""
    x, weight, bias, dy = random_layer(batch, 6, 4)
    for _ in range(2):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = functional.linear(x, weight, bias)
        y.backward(dy.bfloat16())
    assert torch.equal(weight.grad, torch.zeros(4, 6))
    assert torch.equal(bias.grad, torch.zeros(4))
    assert x.grad.shape == x.shape


GELU = {"unfused": {}, "gelu": {"gelu": True}, "gelu and bias": {"gelu": True, "bias_grad": True}}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("fusion", GELU)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_linear_gelu(shape, fusion, dtype):
    x, weight, bias, dy = random_layer(*shape)
    with fusedamp.nn.fusions(**GELU[fusion]), torch.autocast(DEVICE, dtype=dtype):
        y = functional.linear_gelu(x, weight, bias)
        assert is_made_by("LinearGELU", y) == (fusion != "unfused")
    y.backward(dy.to(dtype))
    x16, w16, dy16 = flat(x.detach().to(dtype)), weight.detach().to(dtype), flat(dy.to(dtype))
    pre = product(x16, w16.t(), bias.detach().to(dtype))
    stored = rounded(pre, dtype)
    after_gelu(pre if fusion != "unfused" else stored).check(flat(y.detach()), "forward")
    # The stored argument may be any that its bound allows; the slope bends by at most 1.1.
    inner = before_gelu(Exact(dy16.double(), torch.zeros_like(dy16.double())), pre.value)
    inner = rounded(Exact(inner.value, inner.bound + 1.1 * stored.bound * dy16.double().abs()), dtype)
    exact = inner.value.t() @ x16.double()
    bound = inner.bound.t() @ x16.double().abs()
    bound += 2 * (len(x16) + 2) * 2.0**-24 * (inner.value.abs().t() @ x16.double().abs() + bound)
    Exact(exact, bound).check(weight.grad, "weight grad")
    sums = 2 * (len(x16) + 2) * 2.0**-24 * (inner.value.abs() + inner.bound).sum(0)
    Exact(inner.value.sum(0), inner.bound.sum(0) + sums).check(bias.grad, "bias grad")
    if fusion == "unfused":  # to the bit what the two modules compute
        module = torch.nn.Sequential(fusedamp.nn.Linear(shape[1], shape[2]), torch.nn.GELU("tanh"))
        module[0].weight, module[0].bias = (torch.nn.Parameter(t.detach().clone()) for t in (weight, bias))
        with torch.autocast(DEVICE, dtype=dtype):
            two = module(x.detach())
        two.backward(dy.to(dtype))
        assert torch.equal(two, y)
        assert torch.equal(module[0].weight.grad, weight.grad)


@pytest.mark.parametrize("fusion", [{}, {"gelu": True, "gelu_grad": True}, {"gelu_grad": True}], ids=str)
@pytest.mark.parametrize("call", ["linear_gelu", "mlp"])
def test_gelu_is_the_tanh_approximation(call, fusion):
    """Weights of 1: results are rounded once, and the exact GELU is further away."""
    x = torch.linspace(-4, 4, 512).half()[:, None].requires_grad_()
    one = torch.ones(1, 1).half()
    with fusedamp.nn.fusions(**fusion):
        y = (
            functional.linear_gelu(x, one)
            if call == "linear_gelu"
            else functional.mlp(x, one, None, one, None)
        )
    y.sum().backward()
    wide, half_ulp = x.detach().double(), 2.0**-11
    exact = wide * torch.special.ndtr(wide)
    exact_slope = torch.special.ndtr(wide) + wide * torch.exp(-(wide**2) / 2) / (2 * torch.pi) ** 0.5
    for got, tanh, erf in ((y, gelu(wide), exact), (x.grad, gelu_slope(wide), exact_slope)):
        allowed = half_ulp * tanh.abs() + 1e-6
        assert ((got.double() - tanh).abs() <= allowed).all()
        assert ((erf - tanh).abs() > 2 * allowed).any()


MLPS = {
    "unfused": {},
    "gelu_grad": {"gelu_grad": True, "bias_grad": False},
    "all": {"gelu": True, "gelu_grad": True, "bias_grad": True},
}


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("fusion", MLPS)
def test_mlp(fusion, dtype, with_bias):
    """Against float64 of the whole block; errors as a first order of the roundings in between."""
    torch.manual_seed(1)
    module = fusedamp.nn.MLP(24, 40, 8, bias=with_bias)
    exact = copy.deepcopy(module).double()
    x = torch.randn(3, 11, 24, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    dy = torch.randn(3, 11, 8)
    with fusedamp.nn.fusions(**MLPS[fusion]), torch.autocast(DEVICE, dtype=dtype):
        y = module(x)
        assert is_made_by("MLP", y) == (fusion != "unfused")
    y.backward(dy.to(dtype))
    reference = F.linear(
        gelu(F.linear(wide, exact.fc1.weight, exact.fc1.bias)), exact.fc2.weight, exact.fc2.bias
    )
    reference.backward(dy.double())
    eps = torch.finfo(dtype).eps
    pairs = [(y, reference), (x.grad, wide.grad)]
    pairs += [(p.grad, q.grad) for p, q in zip(module.parameters(), exact.parameters(), strict=True)]
    for got, wanted in pairs:  # some six roundings of random sign on each way
        assert (got.double() - wanted).abs().max() <= 6 * eps * wanted.abs().max(), got.shape
    assert all(p.grad.dtype is torch.float32 for p in module.parameters())


@pytest.mark.parametrize("fusion", [{"gelu": True, "gelu_grad": True}, {"gelu_grad": True}], ids=str)
def test_fused_activations_have_no_second_derivative(fusion):
    x, weight, bias, _ = random_layer((5,), 6, 6, torch.bfloat16)
    with fusedamp.nn.fusions(**fusion):
        calls = {"mlp": functional.mlp(x, weight, bias, weight, bias)}
        if "gelu" in fusion:
            calls["linear_gelu"] = functional.linear_gelu(x, weight, bias)
    for name, y in calls.items():
        with pytest.raises(
            RuntimeError, match=rf"\[{name}\] fused GELU has no second derivative.*functional"
        ):
            torch.autograd.grad(y.sum(), x, create_graph=True)
