"""The ops of linear layers: values within derived bounds of float64, layouts, errors, schemas.

Guards: FP32 sums everywhere, one rounding, tanh and not erf, gradients that land in the right place of any
stride.
"""

import itertools

import numpy
import pytest
import torch
from fusedamp import ops
from fusedamp.ops import linear as linear_ops
from linear_reference import after_gelu, before_gelu, gelu, product, row_sums
from torch._subclasses.fake_tensor import FakeTensorMode

HALF = [torch.float16, torch.bfloat16]
SIZES = [
    (1, 1, 1),
    (2, 3, 5),
    (8, 16, 24),
    (17, 1, 33),
    (1, 64, 7),
    (64, 257, 1),
    (129, 31, 65),
    (257, 24, 127),
]


def made(shape, dtype, seed=0, scale=1.0):
    random = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=random) * scale).to(dtype)


def matrices(m, n, k, dtype):
    return made((m, k), dtype, 1), made((n, k), dtype, 2), made((m, n), dtype, 3), made((n,), dtype, 4)


LAYOUTS = {
    "transposed": lambda t: t.t().contiguous().t(),
    "every second column": lambda t: torch.stack([t, t + 1], -1).flatten(-2)[:, ::2],
    "off by one element": lambda t: torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape),
    "wide rows": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "expanded": lambda t: t[:1].expand(t.shape),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_values(size, dtype):
    x, weight, grad, bias = matrices(*size, dtype)
    for given in (bias, None):
        pre = product(x, weight.t(), given)
        y, stored = ops.linear_gelu(x, weight, given)
        pre.check(stored, "pre")
        after_gelu(pre).check(y, "gelu")
        pre.check(torch.ops.fusedamp._linear(x, weight, given), "linear")
    product(grad, weight).check(torch.ops.fusedamp._linear_input_grad(grad, weight), "input grad")
    for out in (torch.float32, dtype):
        weight_grad, sums = ops.linear_weight_grad(grad, x, dtype=out, bias_grad=True)
        assert weight_grad.dtype is sums.dtype is out
        product(grad.t(), x).check(weight_grad, "weight grad")
        row_sums(grad).check(sums, "bias grad")
    acc = made(weight.shape, torch.float32, 5)
    wanted = product(grad.t(), x, acc)
    sums = ops.linear_weight_grad_(acc, grad, x, bias_grad=True)
    wanted.check(acc, "accumulated")
    row_sums(grad).check(sums, "bias grad")
    assert sums.dtype is torch.float32


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gelu_input_grad(size, dtype):
    m, n, k = size
    grad, weight, pre = made((m, n), dtype, 1), made((n, k), dtype, 2), made((m, k), dtype, 3, 2.0)
    wanted = before_gelu(product(grad, weight), pre)
    for out in (torch.float32, dtype):
        got, sums = ops.linear_gelu_input_grad(grad, weight, pre, bias_grad=True, bias_dtype=out)
        wanted.check(got, "input grad")
        assert sums.dtype is out
        stored = got.double()
        slack = 2 * (m + 2) * 2.0**-24 * stored.abs().sum(0) + wanted.bound.sum(0)
        slack += (torch.finfo(out).eps / 2) * stored.sum(0).abs() + (
            torch.finfo(dtype).eps / 2
        ) * stored.abs().sum(0)
        assert ((sums.double() - stored.sum(0)).abs() <= slack + 1e-7).all()
    _, none = ops.linear_gelu_input_grad(grad, weight, pre, bias_grad=False, bias_dtype=torch.float32)
    assert none.shape == (0,)


def test_a_second_oracle():
    """NumPy's products of the same numbers, in extended precision."""
    x, weight, grad, bias = matrices(33, 17, 29, torch.bfloat16)
    wide = [t.double().cpu().numpy().astype(numpy.longdouble) for t in (x, weight, grad, bias)]
    y = torch.ops.fusedamp._linear(x, weight, bias).double().cpu().numpy()
    exact = wide[0] @ wide[1].T + wide[3]
    assert (abs(y - exact) <= abs(exact) * 2.0**-8 + 1e-4).all()
    weight_grad, sums = ops.linear_weight_grad(grad, x, dtype=torch.float32, bias_grad=True)
    exact = wide[2].T @ wide[0]
    bound = 2 * 35 * 2.0**-24 * (abs(wide[2]).T @ abs(wide[0]))
    assert (abs(weight_grad.double().cpu().numpy() - exact) <= bound).all()
    assert (abs(sums.double().cpu().numpy() - wide[2].sum(0)) <= 2.0**-20 * abs(wide[2]).sum(0)).all()


def test_gelu_is_the_tanh_approximation():
    """It differs from the exact GELU by up to 4.7e-4."""
    x = torch.linspace(-5, 5, 1001).half()[:, None]
    y, pre = ops.linear_gelu(x, torch.ones(1, 1).half(), None)
    assert torch.equal(pre, x)
    exact = x.double() * torch.special.ndtr(x.double())
    off = (y.double() - gelu(x)).abs().max().item()
    assert off <= 2.0**-9 + 1e-6
    assert (gelu(x) - exact).abs().max().item() > 4e-4
    assert torch.equal(y, gelu(x).half()) or off < 2.0**-11 * 5


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype):
    """Of each argument: the result is that of a contiguous copy, to the bit."""
    arrange = LAYOUTS[layout]
    x, weight, grad, bias = matrices(9, 6, 10, dtype)
    pre = made((9, 10), dtype, 5)
    x, weight, grad, pre = (arrange(t) for t in (x, weight, grad, pre))
    plain = [t.contiguous() for t in (x, weight, grad, pre)]
    acc = [made((6, 10), torch.float32, 6) for _ in range(2)]
    for one, two in zip(
        (
            *ops.linear_gelu(x, weight, bias),
            *ops.linear_gelu_input_grad(grad, weight, pre, bias_grad=True, bias_dtype=torch.float32),
            *ops.linear_weight_grad(grad, x, dtype=torch.float32, bias_grad=True),
            ops.linear_weight_grad_(acc[0], grad, x, bias_grad=True),
            acc[0],
        ),
        (
            *ops.linear_gelu(plain[0], plain[1], bias),
            *ops.linear_gelu_input_grad(*plain[2:0:-1], plain[3], bias_grad=True, bias_dtype=torch.float32),
            *ops.linear_weight_grad(plain[2], plain[0], dtype=torch.float32, bias_grad=True),
            ops.linear_weight_grad_(acc[1], plain[2], plain[0], bias_grad=True),
            acc[1],
        ),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-6 if one.dtype is torch.float32 else 0, atol=1e-6)


@pytest.mark.parametrize("empty", [(0, 3, 5), (4, 0, 5), (4, 3, 0), (0, 0, 0)], ids=str)
def test_empty(empty):
    m, n, k = empty
    x, weight, grad, bias = matrices(m, n, k, torch.float16)
    y, pre = ops.linear_gelu(x, weight, bias)
    assert y.shape == pre.shape == (m, n)
    assert torch.equal(pre, bias.expand(m, n))
    weight_grad, sums = ops.linear_weight_grad(grad, x, dtype=torch.float32, bias_grad=True)
    assert torch.equal(weight_grad, torch.zeros(n, k))
    assert torch.equal(sums, grad.float().sum(0))
    acc = torch.full((n, k), float("nan"))
    ops.linear_weight_grad_(acc, grad, x, bias_grad=False)
    assert acc.isnan().all()
    inner, sums = ops.linear_gelu_input_grad(
        grad, weight, made((m, k), torch.float16), bias_grad=True, bias_dtype=torch.float32
    )
    assert inner.shape == (m, k)
    assert sums.shape == (k,)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("where", ["grad", "x"])
def test_non_finite_values_reach_the_gradient(where, bad):
    """A loss scaler finds them there: all of a row of the weight's gradient, or of a column."""
    x, _, grad, _ = matrices(6, 4, 5, torch.float16)
    (grad if where == "grad" else x)[3, 2] = bad
    weight_grad, sums = ops.linear_weight_grad(grad, x, dtype=torch.float32, bias_grad=True)
    acc = torch.zeros(4, 5)
    ops.linear_weight_grad_(acc, grad, x, bias_grad=False)
    for got in (weight_grad, acc):
        hit = ~got.isfinite()
        assert hit[2].all() if where == "grad" else hit[:, 2].all()
        assert hit.sum() == (5 if where == "grad" else 4)
    assert bool(sums[2].isfinite()) == (where == "x")


def test_sums_are_not_rounded_on_the_way():
    """257 rows of ones: BF16 has no 257. 2049 FP16 rows: FP16 has no 2049."""
    for rows, dtype in ((257, torch.bfloat16), (2049, torch.float16)):
        grad, x = torch.ones(rows, 2, dtype=dtype), torch.ones(rows, 3, dtype=dtype)
        acc = torch.ones(2, 3)
        sums = ops.linear_weight_grad_(acc, grad, x, bias_grad=True)
        assert torch.equal(acc, torch.full((2, 3), rows + 1.0))
        assert torch.equal(sums, torch.full((2,), float(rows)))


def test_autocast_changes_nothing():
    """Backward may run within an autocast region."""
    x, weight, grad, bias = matrices(33, 8, 16, torch.float16)
    kind = x.device.type

    def results():
        acc = torch.zeros(8, 16)
        return (
            *ops.linear_gelu(x, weight, bias),
            *ops.linear_weight_grad(grad, x, dtype=torch.float32, bias_grad=True),
            ops.linear_weight_grad_(acc, grad, x, bias_grad=True),
            acc,
            torch.ops.fusedamp._linear(x, weight, bias),
            torch.ops.fusedamp._linear_input_grad(grad, weight),
        )

    plain = results()
    with torch.autocast(kind, dtype=torch.bfloat16):
        inside = results()
    assert all(torch.equal(a, b) for a, b in zip(plain, inside, strict=True))


def test_versions_move():
    """autograd notices what the op wrote."""
    acc = torch.zeros(3, 5)
    before = acc._version
    ops.linear_weight_grad_(
        acc, *matrices(7, 3, 5, torch.float16)[2:1:-1], made((7, 5), torch.float16), bias_grad=False
    )
    assert acc._version > before


def calls(dtype=torch.bfloat16):
    x, weight, grad, bias = matrices(7, 3, 5, dtype)
    pre = made((7, 5), dtype)
    o = torch.ops.fusedamp
    yield o._linear.default, (x, weight, bias), {}
    yield o._linear.default, (x, weight, None), {}
    yield o._linear_input_grad.default, (grad, weight), {}
    yield o.linear_gelu.default, (x, weight, bias), {}
    for bias_grad in (False, True):
        yield (
            o.linear_gelu_input_grad.default,
            (grad, weight, pre),
            {"bias_grad": bias_grad, "bias_dtype": torch.float32},
        )
        yield o.linear_weight_grad.default, (grad, x), {"dtype": torch.float32, "bias_grad": bias_grad}
        yield o.linear_weight_grad_.default, (torch.ones(3, 5), grad, x), {"bias_grad": bias_grad}


@pytest.mark.parametrize("index", range(10))
def test_opcheck(index):
    """Mutation annotations, fake kernels and AOT dispatch agree with what the op does."""
    op, args, kwargs = next(itertools.islice(calls(), index, None))
    torch.library.opcheck(op, args, kwargs)


def test_fake_tensors_have_the_shapes_and_strides():
    for op, args, kwargs in calls():
        real = op(*args, **kwargs)
        with FakeTensorMode() as mode:
            fake = op(*(mode.from_tensor(a) if a is not None else None for a in args), **kwargs)
        for one, two in zip(*(t if isinstance(t, tuple) else (t,) for t in (real, fake)), strict=True):
            assert (one.shape, one.stride(), one.dtype) == (two.shape, two.stride(), two.dtype), op


X, WEIGHT, GRAD, BIAS = matrices(7, 3, 5, torch.float16)


def weight_grad(acc=None, grad=GRAD, x=X, bias_grad=False):
    return ops.linear_weight_grad_(torch.zeros(3, 5) if acc is None else acc, grad, x, bias_grad=bias_grad)


def shared():
    memory = torch.zeros(64)
    return {"acc": memory[:15].view(3, 5), "x": memory[10:40].view(torch.float16)[:35].view(7, 5)}


REFUSED = {
    "x of another width": (
        lambda: ops.linear_gelu(X[:, :4], WEIGHT),
        r"\[linear_gelu\] x has shape \[7, 4\]; expected 5",
    ),
    "x with batch dimensions": (
        lambda: ops.linear_gelu(X[None], WEIGHT),
        r"x has shape \[1, 7, 5\]; expected a strided ma",
    ),
    "another dtype": (
        lambda: ops.linear_gelu(X, WEIGHT.bfloat16()),
        r"weight is bfloat16; expected float16, like x",
    ),
    "FP32": (lambda: ops.linear_gelu(X.float(), WEIGHT), r"x is float32; expected float16 or bfloat16"),
    "bias of another length": (
        lambda: ops.linear_gelu(X, WEIGHT, BIAS[:2]),
        r"bias is float16 of shape \[2\]; expected",
    ),
    "bias of another dtype": (
        lambda: ops.linear_gelu(X, WEIGHT, BIAS.float()),
        r"bias is float32 .* expected float16 \[3\]",
    ),
    "pre of another shape": (
        lambda: ops.linear_gelu_input_grad(GRAD, WEIGHT, X[:6], bias_grad=True, bias_dtype=torch.float32),
        r"\[linear_gelu_input_grad\] pre has shape \[6, 5\]; expected 7 rows, as grad",
    ),
    "weight of another height": (
        lambda: ops.linear_gelu_input_grad(GRAD, WEIGHT[:2], X, bias_grad=True, bias_dtype=torch.float32),
        r"weight has shape \[2, 5\]; expected 3 rows, as grad has shape \[7, 3\]",
    ),
    "bias_dtype": (
        lambda: ops.linear_gelu_input_grad(GRAD, WEIGHT, X, bias_grad=True, bias_dtype=torch.bfloat16),
        r"bias_dtype is bfloat16; expected float32 or float16, like grad",
    ),
    "dtype": (
        lambda: ops.linear_weight_grad(GRAD, X, dtype=torch.float64, bias_grad=False),
        r"\[linear_weight_grad\] dtype is float64; expected float32 or float16, like grad",
    ),
    "rows that differ": (
        lambda: weight_grad(grad=GRAD[:6]),
        r"\[linear_weight_grad_\] x has shape \[7, 5\]; expected 6 rows",
    ),
    "acc of another shape": (lambda: weight_grad(torch.zeros(5, 3)), r"acc is float32 of shape \[5, 3\]"),
    "acc in 16 bits": (
        lambda: weight_grad(torch.zeros(3, 5).half()),
        r"acc is float16 .* expected contiguous float32 \[3, 5\]",
    ),
    "acc that is transposed": (
        lambda: weight_grad(torch.zeros(5, 3).t()),
        r"acc is float32 .*strides \[1, 3\]; expected cont",
    ),
    "acc in the memory of x": (lambda: weight_grad(**shared()), r"acc .* shares memory with x"),
    "meta": (lambda: ops.linear_gelu(X.to("meta"), WEIGHT), r"\[linear_gelu\] x is on the meta device"),
    "sparse": (lambda: ops.linear_gelu(X.to_sparse(), WEIGHT), r"\[linear_gelu\] x is sparse"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_by_name(case):
    call, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("bad", [None, [1.0], 3.0])
def test_no_tensor(bad):
    with pytest.raises(TypeError, match=r"\[linear_gelu\] x is .* expected a tensor"):
        ops.linear_gelu(bad, WEIGHT)


@pytest.mark.host
def test_cpu_fp16_takes_fp32_products(monkeypatch):
    """Where a processor has no FP16 arithmetic; rounded once, as torch's. Few rows are not worth the
    casts."""
    monkeypatch.setattr(linear_ops, "_FP16_IS_FAST", False)
    seen = []
    monkeypatch.setattr(
        linear_ops.F, "linear", lambda *args: seen.append(args[0].shape) or args[0] @ args[1].t()
    )
    x, weight, grad, bias = matrices(24, 3, 4, torch.float16)
    wanted = product(x, weight.t(), bias)
    wanted.check(linear_ops.linear(x, weight, bias), "forward")
    assert not seen
    linear_ops.linear(x[:1], weight, bias)
    large = torch.empty(2048, 2049).half()
    linear_ops.linear(torch.empty(47, 2049).half(), large, None)
    linear_ops.linear(torch.empty(48, 2049).half(), large, None)
    assert seen == [(1, 4), (47, 2049)]
    product(grad, weight).check(linear_ops.linear_input_grad(grad, weight), "input grad")
