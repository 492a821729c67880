"""grad_numerics: exact counts of magnitudes beside grad_stats' results.

Guards: bins and extremes of every dtype, size and layout against numpy's frexp, and the gradient check
itself, which must not change a bit.
"""

import itertools

import numpy
import op_battery
import pytest
import torch
from fusedamp import ops
from fusedamp.ops import gradients
from fusedamp.tensors import addresses
from on_device import DEVICE
from op_calls import BORDERS, DTYPES, HALVES, Unchanged, guarded, same_bits, scalar
from test_ops_stats import NORMS

SIZES = (0, *BORDERS, 127, 128, 129, 4095, 4096, 4097, 4224, 100_003)
EDGES = [
    0.0,
    *(2.0**e for e in (-1074, -149, -126, -41, -40, -39, -25, -24, -15, -14, -13, 0, 15, 19, 20, 21, 127)),
]


def wanted(grad):
    """The extremes and the histogram of one gradient, by numpy alone."""
    s = grad.detach().double().contiguous().view(-1).numpy()
    magnitude, finite = numpy.abs(s), numpy.isfinite(s)
    _, exponent = numpy.frexp(numpy.where(finite, s, 0.0))  # |s| = m * 2^exponent, 0.5 <= m < 1
    floor = exponent - 1
    bins = numpy.where(floor < -40, 1, numpy.where(floor > 19, 62, floor + 42))
    bins = numpy.where(magnitude == 0.0, 0, numpy.where(finite, bins, 63))
    largest = numpy.inf if not finite.all() else magnitude.max(initial=0.0)
    small = ((magnitude > 0.0) & (magnitude < 2.0**-14)).sum()
    return [largest, (magnitude == 0.0).sum(), small], numpy.bincount(bins, minlength=64)


def outputs(n, due=1):
    """Canaries around extremes and histogram, which are full of -7, which is not a count."""
    extremes, whole = guarded(torch.full((n, 3), -7.0, dtype=torch.float64))
    histogram, sound = guarded(torch.full((n, 64), -7))
    return gradients.Numerics(
        extremes, histogram, torch.tensor(due, dtype=torch.int32)
    ), lambda: whole() and sound()


def check(grads, inv_scale=None, norm_type=2.0):
    """Everything that is counted equals numpy's; the four results are grad_stats', bit for bit."""
    numerics, intact = outputs(len(grads))
    with Unchanged(grads):
        stats = ops.grad_numerics(grads, *numerics, inv_scale=inv_scale, norm_type=norm_type)
    assert intact()
    for got, plain in zip(stats, ops.grad_stats(grads, inv_scale, norm_type), strict=True):
        assert same_bits(got, plain)
    for i, grad in enumerate(grads):
        extremes, histogram = wanted(grad)
        assert numerics.extremes[i].tolist() == extremes, f"extremes of grads[{i}]"
        assert numerics.histogram[i].tolist() == histogram.tolist(), f"histogram of grads[{i}]"
    return numerics


def spread(n, dtype, seed=0, bad=False):
    """Magnitudes over the whole range of the dtype and the bins, zeros of both signs among them."""
    random = torch.Generator().manual_seed(seed)
    exponents = torch.randint(-50, 30, (n,), generator=random).double()
    values = torch.randn(n, generator=random).double() * exponents.exp2()
    kinds = torch.randint(0, 40, (n,), generator=random)
    values[kinds == 0], values[kinds == 1] = 0.0, -0.0
    if bad:
        values[kinds == 2], values[kinds == 3], values[kinds == 4] = float("inf"), float("-inf"), float("nan")
    elif dtype == torch.float16:
        values.clamp_(-65504.0, 65504.0)
    return values.to(dtype)


@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("p", NORMS)
def test_all_dtypes_and_sizes(p, bad):
    """In one call; with and without inf and NaN, which send a chunk to another path of the check."""
    grads = [spread(n, dtype, n, bad) for n in SIZES for dtype in DTYPES]
    check(grads, scalar(0.3), p)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_16_bit_pattern(dtype):
    """Each pattern alone in a tensor, and all in one; also in an order where neighbors are equal."""
    every = op_battery.every_half(dtype)
    check([every, every.repeat_interleave(3), every[every.isfinite()]])
    numerics, intact = outputs(2**16)
    ops.grad_numerics(list(every.split(1)), *numerics)
    assert intact()
    extremes, histogram = zip(*(wanted(one) for one in every.split(1)), strict=True)
    assert numerics.extremes.tolist() == list(map(list, extremes))
    assert torch.equal(numerics.histogram, torch.from_numpy(numpy.stack(histogram)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_edges(dtype):
    """The numbers next to every edge of a bin, of both signs, alone and among others."""
    up, down = torch.tensor(torch.inf, dtype=dtype), torch.tensor(0.0, dtype=dtype)
    exact = torch.tensor([*EDGES, *(2.0**e for e in range(-45, 25))], dtype=torch.float64).to(dtype)
    near = (
        torch.cat([exact, torch.nextafter(exact, up), torch.nextafter(exact, down)])
        if dtype not in HALVES
        else exact
    )
    values = torch.cat([near, -near])
    check([values, *values.split(1), values.repeat(300)])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [2.0, 3.5])
def test_one_value_everywhere(dtype, p):
    """Counts of whole chunks in one bin: the most that a table of pairs holds, twice."""
    check(
        [torch.full((n,), value, dtype=dtype) for n in (32_768, 65_536) for value in (0.0, 1.0, torch.inf)],
        None,
        p,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layouts(dtype):
    """0-dim, empty, channels-last, transposed, views off alignment, and each gradient twice."""
    image = spread(2 * 3 * 5 * 7, dtype).view(2, 3, 5, 7)
    shifted = [guarded(spread(n, dtype), offset)[0] for n in (1, 129, 5000) for offset in range(1, 8)]
    grads = [
        spread(1, dtype)[0],
        image.to(memory_format=torch.channels_last),
        image.transpose(0, 3),
        image[:0],
        *shifted,
    ]
    check([*grads, *grads])


def test_bins_as_documented():
    """By hand: one number for each sentence of the documentation."""
    counted = (
        (0.0, 0),
        (-0.0, 0),
        (2.0**-41, 1),
        (-(2.0**-40), 2),
        (2.0**-15, 27),
        (2.0**-14, 28),
        (1.5, 42),
    )
    counted += ((2.0**19, 61), (2.0**20, 62), (1e30, 62), (float("-inf"), 63), (float("nan"), 63))
    numerics = check([torch.tensor([value]) for value, _ in counted])
    assert numerics.histogram.argmax(1).tolist() == [place for _, place in counted]
    one = check([torch.tensor([0.0, -3.0, 2.0**-15, 2.0**-14])])
    assert one.extremes.tolist() == [[3.0, 1.0, 1.0]]


def test_not_due_leaves_the_histogram():
    """Extremes are written all the same. The flag is any number but 0."""
    grads = [spread(n, dtype) for n in (0, 9, 40_000) for dtype in DTYPES]
    due, _ = outputs(len(grads), due=-3)
    numerics, intact = outputs(len(grads), due=0)
    assert all(map(same_bits, ops.grad_numerics(grads, *numerics), ops.grad_numerics(grads, *due)))
    assert intact()
    assert (numerics.histogram == -7).all()
    assert same_bits(numerics.extremes, due.extremes)
    assert due.histogram.sum(1).tolist() == [grad.numel() for grad in grads]


def test_elements_as_they_are_stored():
    """Neither the factor nor what it makes of an element counts."""
    grads = [torch.tensor([1.0, 1e30]), torch.tensor([1.0], dtype=torch.float16)]
    numerics = check(grads, scalar(1e20))
    assert numerics.extremes[:, 0].tolist() == [wanted(grads[0])[0][0], 1.0]


@pytest.mark.parametrize("p", [2.0, 1.0, float("inf"), 0.5])
@pytest.mark.parametrize("bad", [False, True])
@pytest.mark.parametrize("wide", [False, True])
def test_the_check_of_a_step(p, bad, wide):
    """`check_grads` with numerics: its results bit for bit, each tensor's sum, and the counts."""
    grads = [spread(n, dtype, n, bad) for n in (1, 70, 40_000) for dtype in DTYPES[: 4 if wide else 3]]
    fields = addresses.rows(addresses.read(grads))
    for max_norm in (0.5, scalar(0.25)):
        numerics, intact = outputs(len(grads))
        plain = ops.check_grads(fields, wide, scalar(64.0), p, max_norm)
        found = ops.check_grads(fields, wide, scalar(64.0), p, max_norm, numerics)
        assert all(map(same_bits, found[:5], plain[:5]))
        assert plain.per_tensor is None
        assert same_bits(found.per_tensor, ops.grad_stats(grads, scalar(1 / 64), p).per_tensor)
        assert intact()
        for i, grad in enumerate(grads):
            extremes, histogram = wanted(grad)
            assert numerics.extremes[i].tolist() == extremes
            assert numerics.histogram[i].tolist() == histogram.tolist()


def test_both_ways_into_the_op():
    """Tensors whose addresses can not be read are passed themselves: a list with a transposed one."""
    grads = [spread(600, dtype).view(20, 30).t() for dtype in DTYPES]
    assert addresses.read(grads) is None
    check(grads)
    check([grad.contiguous() for grad in grads])


@pytest.mark.parametrize("count", [1, 3])
def test_threads(count, threads):
    """Chunks of one tensor counted by several threads."""
    threads(count)
    check([spread(700_001, dtype) for dtype in DTYPES])


def test_written_tensors_move_their_version():
    grads, (numerics, _) = [torch.ones(3)], outputs(1)
    for fields in (None, addresses.read(grads)):
        before = [t._version for t in numerics]
        gradients._grad_stats(grads, None, 2.0, fields, numerics)
        assert [t._version - v for t, v in zip(numerics, before, strict=True)] == [1, 1, 0]
    assert grads[0]._version == 0


def test_without_numerics_the_ops_are_those_of_before():
    """Their number, and their arguments."""
    grads = [torch.ones(3), torch.ones(2, 3).t()]
    seen = []

    class Note(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "fusedamp":
                seen.append((func._schema.name, len(args), len(kwargs or {})))
            return func(*args, **(kwargs or {}))

    with Note():
        ops.grad_stats(grads[:1], scalar(1.0))
        ops.grad_stats(grads, scalar(1.0))
        ops.check_grads(addresses.rows(addresses.read(grads[:1])), False, scalar(1.0), 2.0, 1.0)
    names = ["_packed_grad_stats", "grad_stats", "_check_grads"]
    assert [name.removeprefix("fusedamp::") for name, _, _ in seen] == names


def test_orders_of_magnitude_of_neighbors():
    """Pairs of every two bins, next to each other and a block apart."""
    values = torch.tensor([0.0, *(1.5 * 2.0**e for e in range(-41, 21)), torch.inf])
    pairs = torch.tensor(list(itertools.product(values.tolist(), repeat=2)))
    check([pairs.flatten(), pairs.t().flatten(), pairs.flatten().bfloat16(), pairs.t().flatten().double()])


def test_without_a_scaler_gradients_are_read_only_where_it_is_due():
    """The private op that a watch uses: results of other steps are undefined, and its buffers untouched."""
    grads = [torch.tensor([0.0, 3.0, 2.0**-20], device=DEVICE)]
    rows = addresses.rows(addresses.read(grads))
    for due in (0, 1):
        extremes = torch.full((1, 3), -1.0, dtype=torch.float64, device=DEVICE)
        histogram = torch.full((1, 64), -1, device=DEVICE)
        flag = torch.full((), due, dtype=torch.int32, device=DEVICE)
        run = torch.ops.fusedamp._packed_grad_numerics
        found = run(rows, grads[0], extremes, histogram, flag, None, 2.0, only_due=True)
        if due:
            assert extremes.tolist() == [[3.0, 1.0, 1.0]]
            assert histogram.sum() == 3
            assert found[2].item() == pytest.approx(9.0)
        else:
            assert (extremes == -1).all()
            assert (histogram == -1).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_lean_check_has_the_largest_of_every_step(dtype):
    """As scalers and watches call it; the public op counts all extremes in every step."""
    grads = [
        torch.tensor([0.0, -3.0, 2.0**-20] * size, dtype=dtype, device=DEVICE) for size in (1, 21, 64, 5000)
    ]
    rows = addresses.rows(addresses.read(grads))
    scale = torch.ones((), device=DEVICE)
    for due in (0, 1):
        flag = torch.full((), due, dtype=torch.int32, device=DEVICE)
        found = []
        for lean in (False, True):
            extremes = torch.full((4, 3), -1.0, dtype=torch.float64, device=DEVICE)
            histogram = torch.full((4, 64), -1, device=DEVICE)
            counted = ops.Numerics(extremes, histogram, flag)
            if lean:
                ops.check_grads(rows, dtype == torch.float64, scale, 2.0, 1.0, counted)
            else:
                ops.grad_numerics(grads, *counted)
            found.append(counted)
        assert torch.equal(found[0].extremes[:, 0], found[1].extremes[:, 0])
        assert torch.equal(found[0].histogram, found[1].histogram)
        assert found[0].extremes[:, 1].tolist() == [1, 21, 64, 5000]
        assert found[0].extremes[:, 2].tolist() == [1, 21, 64, 5000]
        if due:
            assert torch.equal(found[0].extremes, found[1].extremes)
