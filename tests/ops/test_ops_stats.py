"""grad_stats: the gradient check. Norms of every order against float64, counts and found_inf element by
element."""

import time

import pytest
import torch
from fusedamp import ops
from op_calls import BORDERS, DTYPES, Unchanged, scalar
from test_ops_unscale import PLACES

NORMS = (2.0, 1.0, float("inf"), 0.0, 3.5, 0.5)
CHUNK_ROUNDINGS = 32_768 / 64  # additions in one lane of a chunk: 64 lanes in float32, combined in float64


def power_sum(x, p):
    x = x.double().abs()
    if p == float("inf"):
        return x.max() if x.numel() else torch.zeros((), dtype=torch.float64)
    return (x != 0).sum().double() if p == 0.0 else (x**p).sum()


def tolerance(p):
    """Relative: a rounding for each addition of a lane in float32; the other orders are computed in float64,
    both here and there: pow (1 ulp) and as many additions as there are elements."""
    if p in (0.0, float("inf")):
        return 0.0
    return 1.01 * 2.0**-24 * CHUNK_ROUNDINGS if p in (1.0, 2.0) else 2 * 2.0**-52 * (BORDERS[-1] + 1)


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("magnitude", [1.0, 1e30, 1e-30, 3e-45, 0.0], ids=str)
def test_norms_against_float64(p, magnitude):
    """All dtypes and sizes in one call, with magnitudes whose squares overflow or underflow float32."""
    noise = torch.randn(BORDERS[-1], generator=torch.Generator().manual_seed(1)) * magnitude
    grads = [noise[:n].clamp(-6e4, 6e4).half() for n in (*BORDERS, 0)]  # float16 ends there
    grads += [noise[:n].to(dtype) for n in (*BORDERS, 0) for dtype in DTYPES[1:]]
    inv_scale = scalar(0.75)
    with Unchanged([*grads, inv_scale]):
        stats = ops.grad_stats(grads, inv_scale, p)
    # x = g * inv_scale is rounded to float32 here too: for subnormals that is a large relative error.
    scaled = [g * 0.75 if g.dtype == torch.float64 else g.float() * inv_scale for g in grads]
    wanted = torch.stack([power_sum(x, p) for x in scaled])
    assert stats.found_inf.item() == 0.0
    assert not stats.counts.any()
    torch.testing.assert_close(stats.per_tensor, wanted, rtol=tolerance(p), atol=0.0)
    total = stats.per_tensor.max() if p == float("inf") else stats.per_tensor.sum()
    torch.testing.assert_close(stats.total, total, rtol=len(grads) * 2.0**-53, atol=0.0)


def test_shapes_dtypes_and_defaults():
    g = torch.tensor([[3.0, 4.0]])
    stats = ops.grad_stats([g, torch.tensor(12.0), torch.ones(0)])
    assert [(t.dtype, tuple(t.shape)) for t in stats] == [
        (torch.float32, ()),
        (torch.float64, ()),
        (torch.float64, (3,)),
        (torch.int64, (3, 3)),
    ]
    assert stats.per_tensor.tolist() == [25.0, 144.0, 0.0]
    assert stats.total.item() == 169.0


@pytest.mark.parametrize("p", NORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_one_bad_element_anywhere(dtype, p):
    """One tensor per position and bad value, all in one call; each has its own count, and the good ones stay
    at 0."""
    finite = {torch.float16: 60_000.0, torch.float64: 1e308}.get(dtype, 3e38)
    inv_scale = 2.0**116 if dtype == torch.float16 else 8.0  # 60000 * 2^116 is above 2^128
    kinds = {float("inf"): 0, float("-inf"): 0, float("nan"): 1, finite: 2, -finite: 2}
    grads, wanted = [torch.ones(9, dtype=dtype)], [[0, 0, 0]]
    for bad, column in kinds.items():
        for place in PLACES:
            g = torch.ones(PLACES[-1] + 1, dtype=dtype)
            g[place] = bad
            grads.append(g)
            wanted.append([int(column == c) for c in range(3)])
    stats = ops.grad_stats(grads, scalar(inv_scale), p)
    assert stats.counts.tolist() == wanted
    assert ops.grad_stats(grads[:1], scalar(inv_scale), p).found_inf.item() == 0.0
    for bad in grads[1 :: len(PLACES)]:  # one per bad value, alone
        assert ops.grad_stats([grads[0], bad], scalar(inv_scale), p).found_inf.item() == 1.0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_counts_add_up(dtype):
    """Many bad elements over several chunks, with a different number of each."""
    g = torch.ones(70_000, dtype=dtype)
    places = torch.randperm(g.numel(), generator=torch.Generator().manual_seed(3))
    g[places[:500]] = float("inf")
    g[places[500:800]] = float("nan")
    g[places[800:900]] = {torch.float16: 60_000.0, torch.float64: 1e308}.get(dtype, 3e38)
    inv_scale = scalar(2.0**116 if dtype == torch.float16 else 8.0)
    assert ops.grad_stats([g], inv_scale).counts.tolist() == [[500, 300, 100]]


@pytest.mark.parametrize("p", [2.0, 1.0, float("inf"), 3.5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_show_what_is_not_finite(p, dtype):
    """An infinity makes the norm infinite, a NaN makes it NaN, in its tensor and in the total; also with
    both."""
    inf, nan, both = (torch.ones(40_000, dtype=dtype) for _ in range(3))
    inf[39_999] = both[0] = float("inf")
    nan[5] = both[39_000] = float("nan")
    stats = ops.grad_stats([inf], None, p)
    assert stats.per_tensor.isinf().all()
    assert stats.total.isinf()
    stats = ops.grad_stats([inf, nan, both, inf], None, p)
    assert stats.per_tensor.isnan().tolist() == [False, True, True, False]
    assert stats.total.isnan()


def test_float16_is_checked_as_float32():
    """60000 * 4 is not an overflow for a step that computes in float32 (unscale_, which stores it, must
    report it)."""
    g = torch.tensor([60_000.0], dtype=torch.float16)
    assert ops.grad_stats([g], scalar(4.0)).found_inf.item() == 0.0


def test_total_of_many_tiny_among_one_large():
    """Squares too small to change a large float32 sum still count across tensors: the total is a float64
    sum."""
    stats = ops.grad_stats([torch.full((1,), 1e4), *[torch.full((1,), 1e-3)] * 1000])
    wanted = torch.tensor(1e4).double() ** 2 + 1000 * torch.tensor(1e-3).double() ** 2
    torch.testing.assert_close(stats.total, wanted, rtol=3 * 2.0**-24, atol=0.0)
    assert stats.total > 1e8


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_zeros_and_the_smallest_numbers(dtype):
    """Zeros of both signs, and one number among them so small that its square is 0 in float32, anywhere."""
    zeros = torch.zeros(70_000, dtype=dtype)
    zeros[::3] = -0.0
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps  # the least subnormal
    grads = [zeros]
    for place in PLACES:
        grads.append(zeros.clone())
        grads[-1][place] = -least
    stats = ops.grad_stats(grads)
    square = 0.0 if dtype == torch.float64 else least**2  # 2^-2148 is 0 in float64 too
    assert stats.per_tensor.tolist() == [0.0] + [square] * len(PLACES)
    assert not stats.counts.any()
    vanishing = ops.grad_stats([torch.full((40_000,), 2.0**-120)], scalar(2.0**-120))  # products are 0
    assert vanishing.total.item() == 0.0
    assert ops.grad_stats([zeros], scalar(float("inf"))).counts.tolist() == [[0, 0, zeros.numel()]]


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("value", [0.0, 1e-30], ids=["zeros", "tiny"])
def test_zeros_and_tiny_values_take_two_passes_at_most(dtype, value, threads):
    """In cache. An exact pass, element by element, takes 10 to 50 times a fast one."""
    threads(1)
    dense, tried = torch.ones(200_000, dtype=dtype), torch.full((200_000,), value).to(dtype)
    seconds = {"dense": [], "tried": []}
    for _ in range(30):
        for name, grad in (("dense", dense), ("tried", tried)):
            begin = time.perf_counter()
            ops.grad_stats([grad])
            seconds[name].append(time.perf_counter() - begin)
    assert min(seconds["tried"]) < 4 * min(seconds["dense"])
