"""Storage formats by value: every FP32 number through split masters, 8-bit values by their definition."""

import itertools
import platform
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import storage_reference as reference
import torch
from fusedamp import ops
from fusedamp.ops import recode
from on_device import HERE
from op_calls import same_bits, scalar, split_masters

ROOT = Path(__file__).resolve().parents[2]
SIZES = (1, 7, 127, 128, 129, 1000)


@pytest.mark.host
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_every_fp32_value(half, tmp_path):
    """All 2^32: BF16 exact, FP16 exact over its normal range; stochastic roundings with their exact means,
    and bit for bit in the engine's vectors, which are of 16 elements for one half and of 8 for the other."""
    program = tmp_path / "rounding_exhaustive"
    flags = ["-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-ffp-contract=off", "-Wall", "-Wextra"]
    flags += ["-Wno-unused-function"]
    flags += ["-mno-avx512f"] if half and platform.machine() == "x86_64" else []
    subprocess.run(
        ["g++", *flags, str(ROOT / "tests/ops/rounding_exhaustive.cpp"), "-o", str(program)], check=True
    )
    span = [str(half << 31), str((half + 1) << 31)]
    done = subprocess.run([str(program), *span], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def stored(values, seed=0, step=0, nonnegative=False):
    """Return an 8-bit state after a step that sets it to ``values``; non-negative: to their squares."""
    numel = values.numel()
    codes = torch.zeros(numel, dtype=torch.uint8 if nonnegative else torch.int8)
    scales, params = torch.zeros(-(-numel // reference.BLOCK)), torch.zeros(numel)
    options = dict(lr=0.0, scales=[scales], seeds=[seed])
    steps = [scalar(float(step))]
    if nonnegative:
        ops.adagrad_(
            [params], [values], [codes], [], steps, lr_decay=0.0, eps=1.0, weight_decay=0.0, **options
        )
    else:
        ops.sgd_([params], [values], [codes], [], steps, momentum=1.0, **options)
    return codes, scales


def spread(numel, sigma, seed=0):
    """Magnitudes over many octaves, and exact zeros."""
    random = torch.Generator().manual_seed(seed)
    values = torch.randn(numel, generator=random) * torch.exp(sigma * torch.randn(numel, generator=random))
    values[::17] = 0.0
    return values


@pytest.mark.parametrize("nonnegative", [False, True], ids=["signed", "nonnegative"])
@pytest.mark.parametrize("sigma", [0.0, 1.0, 4.0])
@pytest.mark.parametrize("numel", SIZES)
def test_codes_are_neighbors_of_the_value(numel, sigma, nonnegative):
    """Each quantized value is one of the two nearest to its value, and its block's scale is correct."""
    values = spread(numel, sigma)
    codes, scales = stored(values, nonnegative=nonnegative)
    wanted = values * values if nonnegative else values
    assert reference.are_neighbors(codes, scales, wanted)
    assert not nonnegative or (codes > 0).all()  # zero is excluded


@pytest.mark.parametrize("nonnegative", [False, True], ids=["signed", "nonnegative"])
def test_rounding_is_unbiased(nonnegative):
    """The mean over seeds is the value, to within 6 of its own standard deviations, for each element."""
    values = spread(512, 2.0)
    wanted = (values * values if nonnegative else values).double()
    rounds = 400
    total = sum(reference.decoded(*stored(values, seed, nonnegative=nonnegative)) for seed in range(rounds))
    scales = stored(values, nonnegative=nonnegative)[1].double().repeat_interleave(reference.BLOCK)
    relative = (wanted.abs() / scales).cpu().numpy()
    below, above = (torch.from_numpy(side).to(HERE) for side in reference.neighbors(relative, nonnegative))
    cell = (above - below) * scales
    up = ((wanted.abs() - below * scales) / cell).clamp(0, 1)
    deviation = cell * (up * (1 - up) / rounds).sqrt()
    inside = wanted.abs() >= below * scales  # below the smallest quantized value nothing can be unbiased
    error = (total / rounds - wanted).abs()
    # One in 400 draws of a small chance is 20 deviations of it: count those as a cell for each draw.
    assert (error <= 6 * deviation + 6 * cell / rounds)[inside].all()
    assert inside.double().mean() > 0.8


def test_random_bits_depend_on_seed_step_and_place_alone():
    """The same bits again; others for another seed, step, or list; whatever the length of the tensor."""
    values = spread(1000, 0.0)
    codes, _ = stored(values)
    assert torch.equal(codes, stored(values)[0])
    assert torch.equal(codes[:896], stored(values[:896].clone())[0])
    for other in (stored(values, seed=1), stored(values, step=1)):
        assert 0.1 < (codes != other[0]).double().mean() < 0.9
    codes, _ = stored(torch.full((4096,), 1.03))
    up = (codes != codes.min()).double()
    for lag in (1, 2, 3, 16, reference.BLOCK, 512, 1024):
        assert_unrelated(up[:-lag], up[lag:])


def assert_unrelated(one, other):
    """Roundings of the two are independent."""
    assert 0.1 < one.mean() < 0.9
    assert abs(np.corrcoef(one.cpu().numpy(), other.cpu().numpy())[0, 1]) < 6 / one.numel() ** 0.5


def test_lists_draw_apart():
    """States and a weight of one element are rounded by numbers that have nothing to do with each other."""
    numel = 2**16
    grad, weight = torch.full((numel,), 1.3), torch.full((numel,), 1.0, dtype=torch.bfloat16)
    states = [torch.zeros(numel, dtype=torch.bfloat16) for _ in range(3)]
    ops.adamw_(
        [weight], [grad], *([state] for state in states), [], [scalar(0.0)], lr=1e-3, betas=(0.9, 0.99),
        eps=1e-8, weight_decay=0.0, amsgrad=True, stochastic_rounding=True,
    )  # fmt: skip
    ups = [(rounded != rounded.min()).double() for rounded in (*states, weight)]
    for one, other in itertools.combinations(ups, 2):
        assert_unrelated(one, other)


@pytest.mark.parametrize(
    ("bad", "nonnegative"), [(torch.nan, False), (torch.nan, True), (torch.inf, False), (-torch.inf, False)]
)
def test_what_is_not_finite_shows(bad, nonnegative):
    """Quantization never hides a NaN, nor a signed infinity: the scale of its block is NaN, and so is what
    the block holds then."""
    values = torch.ones(300)
    values[200] = bad
    codes, scales = stored(values, nonnegative=nonnegative)
    assert scales.isnan().tolist() == [False, True, False]
    assert recode.dequantized(codes, scales).isnan().sum() == 128
    again = recode.quantized(values, codes.dtype)
    assert again[1].isnan().tolist() == [False, True, False]


def test_infinity_saturates_where_no_value_is_negative():
    """A finite gradient whose square overflows gives the largest quantized value and scale, in the step and
    in conversions; the rest of its block stays positive and finite."""
    gradients = torch.ones(300)
    gradients[200] = 1e21
    for codes, scales in (
        stored(gradients, nonnegative=True),
        recode.quantized(gradients * gradients, torch.uint8),
    ):
        assert scales.tolist() == [1.0, 2.0**126, 1.0]
        assert codes[200].item() == 255
        found = recode.dequantized(codes, scales)
        assert (found > 0).all()
        assert found[200].item() == (2 - 2**-5) * 2.0**126  # the last of 32 values below 2
        assert (found[129:200] < 2.0**103).all()


def test_one_spike_leaves_the_weights_finite():
    """AdamW with 8-bit states: a gradient of 1e21 among others of 1e-3, once. Only its block feels it."""
    weights, steps, numel = [torch.zeros(384)], [scalar(0.0)], 384
    states = [torch.zeros(numel, dtype=torch.int8), torch.zeros(numel, dtype=torch.uint8)]
    scales = [torch.zeros(3), torch.zeros(3)]
    for spike in (1e21, 1e-3, 1e-3):
        grad = torch.full((numel,), 1e-3)
        grad[130] = spike
        ops.adamw_(
            weights, [grad], states[:1], states[1:], [], [], steps,
            lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, scales=scales,
        )  # fmt: skip
    assert weights[0].isfinite().all()
    others = torch.cat((weights[0][:128], weights[0][256:]))
    assert (others < -2e-3).all()


@pytest.mark.parametrize("nonnegative", [False, True], ids=["signed", "nonnegative"])
@pytest.mark.parametrize("exponent", [-148, -126, -100, 0, 60, 126, 127])
def test_any_magnitude(nonnegative, exponent):
    """Blocks from the smallest to the largest numbers: within a cell of the value, or 2^-126; finite."""
    root = exponent // 2 if nonnegative else exponent
    values = torch.tensor([1.0, 1.25, 1.9999]).mul(2.0**root) if root > -127 else torch.full((3,), 2.0**root)
    wanted = (values * values if nonnegative else values).double()
    found = recode.dequantized(*stored(values, nonnegative=nonnegative)).double()
    wanted = wanted.clamp(max=1.9 * 2.0**126)  # the largest quantized value
    assert ((found - wanted).abs() <= wanted / 16 + 2.0**-126).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8], ids=str)
def test_conversions_agree_with_the_definition(dtype):
    """Conversion of checkpoints: dequantizing is exact, quantizing is to nearest."""
    values = spread(1000, 3.0)
    values = values.square() if dtype == torch.uint8 else values
    codes, scales = recode.quantized(values, dtype)
    found = recode.dequantized(codes, scales)
    assert torch.equal(found.double(), reference.decoded(codes, scales))
    repeated = scales.repeat_interleave(reference.BLOCK)[:1000].double()
    share = (values.double().abs() / repeated).cpu().numpy()
    below, above = reference.neighbors(share, dtype == torch.uint8)
    nearest = np.minimum(np.abs(share - below), np.abs(share - above))
    error = ((found.double().abs() - values.double().abs()).abs() / repeated).cpu().numpy()
    assert np.allclose(error, nearest, rtol=1e-5, atol=0)
    again = recode.quantized(found, dtype)
    assert same_bits(recode.dequantized(*again), found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_split_conversions_are_exact(dtype):
    """FP32 masters to split ones and back, for checkpoints: values of normal size, ties, NaN, infinity."""
    bits = torch.randint(-(2**31), 2**31, (2**18,), generator=torch.Generator().manual_seed(0)).to(
        torch.int32
    )
    ties = (torch.arange(2**16, dtype=torch.int32) << 16) + 0x8000
    masters = torch.cat([bits, ties, (ties & ~0xFFFF) + 0x1000]).view(torch.float32)
    if dtype == torch.float16:
        masters = masters[(masters.abs() >= 2.0**-16) & (masters.abs() < 65520)]
    weight, remainder = split_masters(masters, dtype)
    back = recode.master_of(weight, remainder)
    finite = ~masters.isnan()
    assert same_bits(back[finite], masters[finite])
    assert back[~finite].isnan().all()
    assert weight[~finite].isnan().all()


def test_split_float16_below_and_above_its_exact_range():
    """As documented: multiples of 2^-39 below 2^-16, to nearest; from 65520 on, infinity."""
    random = torch.rand(2**16, generator=torch.Generator().manual_seed(0))
    steps = torch.arange(2**16).double() / 4  # quarters of 2^-39, with all ties
    beside = (torch.arange(64).double() + 0.5) * 2.0**15  # and values close to the ties between weights
    steps = torch.cat([steps, *(beside + off for off in (-1.0, -0.75, -0.5, 0.0, 0.5, 0.75, 1.0))])
    small = torch.cat(
        [(steps * 2.0**-39).float(), random * 2.0**-16, random * 2.0**-30, torch.tensor([1e-40])]
    )
    small = torch.cat([small, -small])
    back = recode.master_of(*split_masters(small, torch.float16))
    units = small.double() * 2.0**39
    nearest = units.round()
    # Beside an odd weight a tie is none of its own: what would round to it stays one step nearer.
    weight = (small.to(torch.float16).double() * 2.0**39).round()
    kept = weight + (nearest - weight).clamp(-16383, 16383)
    odd = (weight / 2.0**15).remainder(2) == 1
    assert torch.equal(back.double(), torch.where(odd, kept, nearest) * 2.0**-39)
    assert (odd & (kept != nearest)).any()
    large = torch.tensor([65519.99, 65520.0, 1e30, torch.inf])
    weight, remainder = split_masters(torch.cat([large, -large]), torch.float16)
    assert weight.isinf().tolist() == [False, True, True, True] * 2
    assert remainder.tolist()[1:4] == [0, 0, 0]
    assert torch.equal(recode.master_of(weight, remainder)[:1], large[:1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_split_conversions_are_what_a_step_makes(dtype):
    """Checkpoints and steps mean the same: a step that moves nothing leaves converted masters as they are."""
    generator = torch.Generator().manual_seed(0)
    masters = (
        torch.randint(-(2**31), 2**31, (2**18,), generator=generator).to(torch.int32).view(torch.float32)
    )
    masters = torch.cat([masters, torch.randn(2**16, generator=generator) * 2.0**-12])
    masters = masters[masters.isfinite()]
    weight, remainder = split_masters(masters, dtype)
    stepped, kept = weight.clone(), remainder.clone()
    ops.sgd_([stepped], [torch.ones(masters.shape)], [], [kept], [scalar(0.0)], lr=0.0)
    finite = weight.isfinite()
    assert same_bits(stepped[finite], weight[finite])
    assert torch.equal(kept[finite], remainder[finite])
