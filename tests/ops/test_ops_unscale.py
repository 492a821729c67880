"""unscale_: values bit for bit, and found_inf for every non-finite value at every position that code may
treat specially."""

import pytest
import torch
from fusedamp import ops
from op_calls import BORDERS, DTYPES, HALVES, Unchanged, same_bits, same_numbers, scalar

# Where a lane, a vector, a block or a chunk begins or ends.
PLACES = (0, 1, 15, 16, 63, 64, 65, 511, 512, 513, 32_767, 32_768, 32_769, 32_800, 33_279, 33_280, 33_290)


def wanted(g, inv_scale):
    """torch's own arithmetic: float32 (float64 for float64), rounded back."""
    return (g * inv_scale.double()) if g.dtype == torch.float64 else (g.float() * inv_scale).to(g.dtype)


@pytest.mark.parametrize("inv_scale", [1.0, 2.0**-16, 1 / 3, 1e-30, 0.0, -1.5])
def test_values(inv_scale):
    """Every size around the borders, every dtype in one call."""
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(n, generator=random).to(dtype) for n in (*BORDERS, 0) for dtype in DTYPES]
    grads += [torch.tensor(3.5, dtype=dtype) for dtype in DTYPES]
    inverse, found_inf = scalar(inv_scale), torch.zeros(1)
    expected = [wanted(g, inverse) for g in grads]
    with Unchanged([inverse]):
        ops.unscale_(grads, inverse, found_inf)
    assert found_inf.item() == 0.0
    assert all(same_bits(a, b) for a, b in zip(grads, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_finds_one_bad_element_anywhere(dtype, bad):
    for place in PLACES:
        g = torch.ones(PLACES[-1] + 1, dtype=dtype)
        g[place] = bad
        expected, found_inf = wanted(g, scalar(0.5)), torch.zeros(())
        ops.unscale_([torch.ones(3), g, torch.ones(3)], scalar(0.5), found_inf)
        assert found_inf.item() == 1.0, place
        assert same_numbers(g, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_finds_what_overflows_only_when_multiplied(dtype, sign):
    """A finite gradient with a product that is infinite as stored: 60000 * 4 in float16 although float32
    could hold it."""
    large = {torch.float16: 60_000.0, torch.float64: 1e308}.get(dtype, 3e38)
    for place in PLACES:
        g = torch.ones(PLACES[-1] + 1, dtype=dtype)
        g[place] = sign * large
        found_inf = torch.zeros(())
        ops.unscale_([g], scalar(4.0), found_inf)
        assert found_inf.item() == 1.0, place
        assert g[place].isinf()
        assert int(g.isfinite().sum()) == g.numel() - 1


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding_up_to_infinity_counts(dtype):
    """The product is finite in float32 and rounds to infinity in 16 bits; just below, it rounds down to the
    largest."""
    info = torch.finfo(dtype)
    below, above = (65_519.996, 65_520.0) if dtype == torch.float16 else (3.3961e38, 3.3962e38)
    for product, bad in ((below, 0.0), (above, 1.0)):
        g = torch.full((3,), 2.0**14, dtype=dtype)
        found_inf = torch.zeros(())
        ops.unscale_([g], scalar(product / 2.0**14), found_inf)
        assert found_inf.item() == bad
        assert g[0].item() == (float("inf") if bad else info.max)


@pytest.mark.parametrize("inv_scale", [float("inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bad_inv_scale_is_found(inv_scale, dtype):
    """1 / scale is infinite from scale 2^-128 on; even zeros become NaN then."""
    found_inf = torch.zeros(())
    ops.unscale_([torch.zeros(5, dtype=dtype)], scalar(inv_scale), found_inf)
    assert found_inf.item() == 1.0


@pytest.mark.parametrize("before", [0.0, 1.0, 7.0])
def test_good_gradients_leave_found_inf_alone(before):
    """found_inf collects over several calls: only a bad one writes it."""
    found_inf = torch.full((1, 1), before)
    ops.unscale_([torch.ones(600), torch.ones(0)], scalar(0.5), found_inf)
    assert found_inf.item() == before
    ops.unscale_([torch.tensor([float("nan")])], scalar(0.5), found_inf)
    assert found_inf.item() == 1.0


def test_an_infinity_times_zero_was_infinite_before():
    found_inf = torch.zeros(())
    ops.unscale_([torch.tensor([1.0, float("inf")], dtype=torch.float16)], scalar(0.0), found_inf)
    assert found_inf.item() == 1.0


def test_no_gradients():
    found_inf = torch.zeros(())
    ops.unscale_([], scalar(0.5), found_inf)
    ops.unscale_([torch.ones(0)], scalar(float("inf")), found_inf)
    assert found_inf.item() == 0.0
