"""The op that brings masters and states from one format into another, against NumPy: any size, order of
memory and dtype; what it refuses; tensors without data."""

import numpy as np
import pytest
import storage_reference as reference
import torch
from fusedamp.ops import recode
from on_device import HERE
from op_calls import HALVES, same_bits, same_numbers, split_masters
from test_ops_masters import every_half
from torch._subclasses.fake_tensor import FakeTensorMode

SHAPES = [(), (0,), (1,), (127,), (128,), (129,), (3, 5, 7), (40_000,), (2, 3, 4, 5)]
EXTREMES = (0.0, -0.0, torch.inf, -torch.inf, torch.nan, 65519.99, 65520.0, 7e4, -3e38, 2.0**-25, -1e-40)


def random(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(shape, generator=generator, device="cpu")
    return (values * torch.randn(shape, generator=generator, device="cpu").mul(3).exp()).to(HERE)


def layouts(tensor):
    """The same values in several orders of memory, all dense."""
    yield tensor
    if tensor.dim() > 1:
        yield tensor.mT.contiguous().mT
    if tensor.dim() == 4:
        yield tensor.contiguous(memory_format=torch.channels_last)


def nearest(values, dtype):
    """The nearest 8-bit values, which are found among all, and the scales of ``values`` in one dimension."""
    nonnegative, wide = dtype == torch.uint8, values.double().cpu().numpy()
    scales = [reference.scale_of(wide[i : i + 128], nonnegative) for i in range(0, len(wide), 128)]
    each = np.repeat(scales, 128)[: len(wide)]
    share = np.divide(np.abs(wide), each, out=np.zeros_like(wide), where=each > 0)
    table = reference.values_of_codes(nonnegative)
    middle = (table[1:] + table[:-1]) / 2
    magnitude = np.maximum(np.searchsorted(middle, share, side="right"), int(nonnegative))
    codes = magnitude if nonnegative else magnitude * np.where(wide < 0, -1, 1)
    return torch.from_numpy(codes).to(dtype), torch.tensor(scales, dtype=torch.float32, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_quantized_in_every_order_of_memory(shape, dtype):
    for values in layouts(random(shape).abs() if dtype == torch.uint8 else random(shape)):
        codes, scales = recode.quantized(values, dtype)
        assert codes.stride() == values.stride()
        assert codes.dtype == dtype
        in_order = [t.as_strided((t.numel(),), (1,)) for t in (values, codes)]
        wanted = nearest(in_order[0], dtype)
        assert torch.equal(in_order[1].cpu(), wanted[0])
        assert same_bits(scales.cpu(), wanted[1])
        back = recode.dequantized(codes, scales)
        assert back.stride() == values.stride()
        in_order[0] = back.as_strided((back.numel(),), (1,))
        assert torch.equal(in_order[0].double(), reference.decoded(in_order[1], scales))


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn], ids=str
)
def test_quantized_from_every_dtype(dtype):
    values = random((1000,)).to(dtype)
    for found, wanted in zip(
        recode.quantized(values, torch.int8), recode.quantized(values.float(), torch.int8), strict=True
    ):
        assert same_bits(found, wanted)


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_blocks_that_hold_a_nan_have_the_codes_of_zero(dtype):
    values = torch.ones(300)
    values[130], values[131] = torch.nan, torch.inf
    codes, scales = recode.quantized(values, dtype)
    assert (codes[128:256] == recode.zero_code(dtype)).all()
    assert scales.isnan().tolist() == [False, True, False]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masters_in_every_order_of_memory(shape, dtype):
    masters = random(shape).clamp(-6e4, 6e4)
    masters = torch.where(masters.abs() < 2.0**-14, 1.0, masters)
    for master in layouts(masters):
        weight, remainder = split_masters(master, dtype)
        assert remainder.stride() == master.stride()
        assert same_bits(recode.master_of(weight, remainder), master)
        rounded = reference.rounded_away(master) if dtype == torch.bfloat16 else master.to(dtype)
        assert torch.equal(weight, rounded)
        found = recode.master_of(weight, master)
        assert found.stride() == master.stride()
        assert same_numbers(found, reference.followed(master, weight))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_extreme_masters_beside_every_weight(dtype):
    """NaN and infinities, too, beside all 65,536 weights: a master that does not fit is the weight."""
    weights = every_half(dtype).to(HERE)
    for value in EXTREMES:
        masters = torch.full(weights.shape, value)
        found = recode.master_of(weights, masters)
        assert same_numbers(found, reference.followed(masters, weights))
        split, remainder = weights.clone(), torch.empty_like(weights, dtype=torch.int16)
        recode.split_master_(split, masters, remainder)
        fits = (
            weights.float() == reference.rounded_away(masters).float()
            if value == value
            else weights != weights
        )
        changed = (split != weights) & ~weights.isnan()
        assert not changed[~fits].any()  # a weight is what the model has; ties alone go to its neighbor
        assert (remainder[split.isnan()] == 0).all()


def test_ties_change_their_weight_away_from_zero():
    """1 + 2^-8 is half way between two weights: to even in FP32 form, away from zero in split form."""
    masters = torch.tensor([1 + 2.0**-8, -1 - 2.0**-8, 1 + 3 * 2.0**-8, 5.0])
    weights = masters.bfloat16()
    weights[3] = 7.0  # modified
    assert weights[:2].tolist() == [1.0, -1.0]
    remainder, version = torch.empty(4, dtype=torch.int16), weights._version
    recode.split_master_(weights, masters, remainder)
    assert weights.tolist() == [1 + 2.0**-7, -1 - 2.0**-7, 1 + 2.0**-6, 7.0]
    assert weights._version > version
    assert recode.master_of(weights, remainder).tolist() == [*masters[:3].tolist(), 7.0]


@pytest.mark.parametrize("meta", [False, True], ids=["fake", "meta"])
def test_tensors_without_data_have_shapes_and_strides(meta):
    with FakeTensorMode():
        device = "meta" if meta else HERE
        master = torch.empty(3, 4, 5, 6, device=device).to(memory_format=torch.channels_last)
        weight, remainder = split_masters(master, torch.bfloat16)
        codes, scales = recode.quantized(master, torch.uint8)
        made = [recode.master_of(weight, remainder), recode.dequantized(codes, scales), remainder, codes]
        assert all(t.stride() == master.stride() and t.shape == master.shape for t in made)
        assert [t.dtype for t in made] == [torch.float32, torch.float32, torch.int16, torch.uint8]
        assert scales.shape == (3,)


HALF, SINGLE, EIGHT, SCALES = torch.float16, torch.float32, torch.int8, torch.zeros(1, device="cpu")
REFUSED = {
    "weight is float32": (SINGLE, SINGLE, SINGLE, None),
    "source is float64": (torch.float64, SINGLE, HALF, None),
    "source is int16; expected float32, to become": (torch.int16, torch.int16, HALF, None),
    "target is float16": (SINGLE, HALF, HALF, None),
    "target is int16; expected int8 or uint8": (SINGLE, torch.int16, None, SCALES),
    "target is int8; expected float32, as source": (EIGHT, EIGHT, None, SCALES),
    "source is int32": (torch.int32, EIGHT, None, SCALES),
    "source is int16; expected float16": (torch.int16, EIGHT, None, SCALES),
    "scales are missing": (SINGLE, EIGHT, None, None),
    "scales are float64 of shape": (SINGLE, EIGHT, None, SCALES.double()),
    r"scales are float32 of shape \[2\]": (SINGLE, EIGHT, None, torch.zeros(2, device="cpu")),
    "scales are given beside a weight": (SINGLE, SINGLE, HALF, SCALES),
}


@pytest.mark.parametrize("complaint", REFUSED)
def test_formats_that_do_not_go_together_are_refused(complaint):
    source, target, weight, scales = REFUSED[complaint]
    made = [None if dtype is None else torch.ones(2, 3).to(dtype) for dtype in (source, target, weight)]
    with pytest.raises(ValueError, match=rf"^\[_recode_\] {complaint}"):
        recode._recode(*made, None if scales is None else scales.to(HERE))


def test_places_that_do_not_go_together_are_refused():
    master, weight = torch.ones(4, 6), torch.ones(4, 6, dtype=torch.bfloat16)
    remainder = torch.empty(4, 6, dtype=torch.int16)
    for other, complaint in (
        (torch.ones(6, 4), "target has shape"),
        (torch.ones(6, 4).t(), "target has strides"),
        (torch.ones(4, 12)[:, ::2], "target .* has gaps"),
        (master, "target .* shares memory with source"),
    ):
        with pytest.raises(ValueError, match=rf"^\[_recode_\] {complaint}"):
            recode.master_of(weight, master, other)
    with pytest.raises(ValueError, match="shares memory"):
        recode.split_master_(weight, master, weight.view(torch.int16))
    assert (weight == 1).all()
    recode.split_master_(weight, master, remainder)
