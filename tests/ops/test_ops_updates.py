"""``updates`` of the step ops: what moved, what a 16-bit weight alone would not feel, and sums of squares.

Guards the definitions, which tests/shared/update_oracle.py has a second time; and that the step stays what
it is.
"""

import math
from unittest import mock

import pytest
import torch
from fusedamp import ops
from fusedamp.ops import recode
from fusedamp.ops.inputs import DeviceInputs
from fusedamp.ops.step import HYPER
from fusedamp.ops.table import StepTable
from op_calls import BORDERS, HALVES, VARIANTS, StepCall, bits, same_bits, scalar, step_call
from update_oracle import FORMATS, before_and_after, call_in, check, values, wanted

RENAMED = ("params", "grads", "masters", "steps")
SHAPES = [(5,), (), (0,), (15,), (16,), (17,), (127,), (3, 43), (700,), (33_000,)]


def tally(count):
    return torch.full((count, 4), -7.0, dtype=torch.float64)


def due(value=1):
    return torch.tensor(value, dtype=torch.int32)


def with_updates(call, **options):
    """A copy of the call with updates, which it also returns."""
    call, updates = call.clone(), tally(len(call.params))
    call.options |= dict(updates=updates) | options
    return call, updates


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_definitions_and_the_same_step(variant, form):
    """Guards every rule in every format: counts exactly, sums to their roundings, and that all that the step
    writes has the bits of a step without updates."""
    plain = call_in(form, variant, SHAPES, taken=(0, 1, 30), inv_scale=scalar(0.5))
    told, updates = with_updates(plain, due=due(-3))
    old, new = before_and_after(plain)
    found = plain.clone()
    told.run()
    check(updates, found, old, new)
    plain.run()
    assert all(map(same_bits, told.tensors(), plain.tensors()))
    total = updates.sum(0)
    assert total[0] > 0
    assert (total[1] > 0) == ("float32" not in form and "float64" not in form)


@pytest.mark.parametrize("masters", ["fp32", "split", "none"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_8_bit_states(dtype, masters):
    call = step_call("adamw", [(n,) for n in BORDERS], dtype, masters=masters != "none", lr=1e-3)
    if masters == "split":
        call.params, call.masters = map(
            list, zip(*(recode_split(m, dtype) for m in call.masters), strict=True)
        )
    scales = []
    for states, code in zip(call.states[:2], (torch.int8, torch.uint8), strict=True):
        pairs = [recode.quantized(state, code) for state in states]
        states[:] = [codes for codes, _ in pairs]
        scales += [scale for _, scale in pairs]
    call.options["scales"] = scales

    def fresh():
        copy = call.clone()
        copy.options["scales"] = [scale.clone() for scale in scales]
        return copy

    old, new = before_and_after(fresh())
    told = fresh()
    updates = told.options["updates"] = tally(len(BORDERS))
    told.run()
    check(updates, call, old, new)


def recode_split(master, dtype):
    weight, remainder = master.to(dtype), torch.empty_like(master, dtype=torch.int16)
    recode.split_master_(weight, master, remainder)
    return weight, remainder


def sgd(weights, changes, masters=(), **options):
    """Updates of p -= change, with learning rate 1."""
    updates = tally(1)
    grad = torch.tensor(changes, dtype=weights.dtype if weights.dtype == torch.float64 else torch.float32)
    ops.sgd_([weights], [grad], [], [*masters], [scalar(0.0)], lr=1.0, updates=updates, **options)
    return updates[0].tolist()


UNIT = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}  # of the last place from 1 on
inf, nan = math.inf, math.nan


@pytest.mark.parametrize("masters", [False, True])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ties(dtype, masters):
    """Half a unit from an even weight is lost, from an odd one it is not; a bit more never is."""
    u = UNIT[dtype]
    weights = [1.0, 1.0 + u, 1.0, 1.0 + u, 1.0 + 2 * u, 1.0, 1.0, -1.0]
    changes = [-u / 2, -u / 2, -u / 2 - 2**-20, -u / 2 + 2**-20, u / 2, u / 4, u / 4 + 2**-20, u / 2]
    lost = [1, 0, 0, 1, 1, 1, 0, 1]
    for weight, change, gone in zip(weights, changes, lost, strict=True):
        p = torch.tensor([weight], dtype=dtype)
        moved, got, square, of_old = sgd(p, [change], [torch.tensor([weight])] if masters else [])
        assert [moved, got, square] == [1, gone, change**2], (weight, change)
        assert of_old == p.new_tensor([weight]).double().item() ** 2


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_zeros_and_signs(dtype):
    """-0 is 0: it has not moved. What 0 becomes is not 0 to the bit where its sign changes."""
    least = 2.0**-24 if dtype == torch.float16 else 2.0**-133
    assert sgd(torch.tensor([0.0], dtype=dtype), [0.0])[:2] == [0, 0]
    assert sgd(torch.tensor([-0.0], dtype=dtype), [-0.0])[:2] == [0, 0]  # becomes 0
    assert sgd(torch.tensor([0.0], dtype=dtype), [-least / 4])[:2] == [1, 1]
    assert sgd(torch.tensor([0.0], dtype=dtype), [least / 4])[:2] == [1, 0]  # would become -0
    assert sgd(torch.tensor([-0.0], dtype=dtype), [least / 4])[:2] == [1, 1]
    assert sgd(torch.tensor([least], dtype=dtype), [least / 2])[:2] == [1, 0]  # a tie to the even 0
    assert sgd(torch.tensor([2 * least], dtype=dtype), [least / 2])[:2] == [1, 1]
    assert sgd(torch.tensor([-least], dtype=dtype), [-least])[:2] == [1, 0]


def test_subnormal_float16():
    """Below 2^-14 the unit is 2^-24, just below it as above."""
    weights = torch.tensor([3 * 2.0**-24, 2.0**-14, 2.0**-14 - 2.0**-24, 2.0**-14], dtype=torch.float16)
    changes = [2.0**-26, 2.0**-25, 2.0**-25 - 2.0**-40, 2.0**-25 + 2.0**-40]
    assert sgd(weights, changes)[:2] == [4, 3]


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32, torch.float64], ids=str)
def test_not_finite(dtype):
    """NaN moves, also where it stays NaN, and is never lost."""
    for weight, change in ((nan, 0.0), (inf, 1.0), (inf, inf), (1.0, nan)):  # infinite weights become NaN
        moved, lost, square, of_old = sgd(torch.tensor([weight, 1.0], dtype=dtype), [change, 0.0])
        assert (moved, lost, math.isnan(square)) == (1, 0, True)
        assert of_old == weight + 1.0 or (math.isnan(weight) and math.isnan(of_old))
    assert sgd(torch.tensor([1.0, 2.0], dtype=dtype), [-inf, 0.0]) == [1, 0, inf, 5.0]


def test_a_master_beyond_its_infinite_weight():
    """The weight is infinite whatever its finite master does: that is lost."""
    weight, master = torch.tensor([inf], dtype=torch.float16), torch.tensor([70_000.0])
    assert sgd(weight, [8.0], [master]) == [1, 1, 64.0, 70_000.0**2]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_weight_and_thousands_of_updates(dtype):
    """All 2^16 weights, with updates around their halves of a unit and far from them, against torch."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    random = torch.Generator().manual_seed(0)
    for master in (False, True):
        for scale in (2.0**-30, 2.0**-12, 2.0**-9, 1.0, 2.0**-24, 2.0**100):
            unit = (every.float().abs() * scale).clamp(2.0**-26, 3e38)
            grad = torch.randn(every.shape, generator=random) * unit
            grad[::3] = (every.float().abs().clamp(min=2.0**-14) * UNIT[dtype] / 2)[::3]
            call = step_call("sgd", [every.shape], dtype, masters=master, lr=1.0, weight_decay=0.0)
            call.params[0].copy_(every)
            call.grads[0] = grad
            if master:
                call.masters[0].copy_(every.float())
            told, updates = with_updates(call)
            old, new = before_and_after(call)
            told.run()
            check(updates, call, old, new)


def test_a_modified_weight():
    """old is the master that has followed the weight: the modification itself is no update."""
    weight, master = torch.tensor([1.0], dtype=torch.bfloat16), torch.tensor([1.0])
    weight.fill_(4.0)
    assert sgd(weight, [0.0], [master]) == [0, 0, 0.0, 16.0]
    weight.fill_(2.0)
    assert sgd(weight, [1.0], [master]) == [1, 0, 1.0, 4.0]


def test_what_rounding_to_nearest_loses_and_stochastic_rounding_keeps():
    """Without masters the value before rounding counts: what is lost does not depend on what follows."""
    for stochastic in (False, True):
        weight = torch.ones(4096, dtype=torch.bfloat16)
        found = sgd(weight, [-(2.0**-9)] * 4096, stochastic_rounding=stochastic)
        assert found == [4096, 4096, 4096 * 2.0**-18, 4096.0]
        assert bool((weight != 1.0).any()) == stochastic


def test_a_split_master_that_cannot_hold_the_update():
    """FP16 remainders hold multiples of 2^-39 below 2^-16: the joined value after the step has not moved."""
    weight, remainder = recode_split(torch.tensor([2.0**-20]), torch.float16)
    assert sgd(weight, [2.0**-42], [remainder]) == [0, 0, 0.0, 2.0**-40]
    assert sgd(weight, [2.0**-39], [remainder]) == [1, 1, 2.0**-78, 2.0**-40]


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(size):
    weight = torch.full((40_000,), size)
    moved, lost, square, of_old = sgd(weight.clone(), weight.tolist())
    exact = 40_000 * weight[0].double().item() ** 2
    assert (moved, lost) == (40_000, 0)
    assert square == of_old == pytest.approx(exact, rel=1e-12)


@pytest.mark.parametrize("value", [0, 1, -1, 2**30])
@pytest.mark.parametrize("overflow", [0.0, -0.0, 1.0, nan])
@pytest.mark.parametrize("form", ["masters", "float32", "float64"])
def test_due_and_skipped(form, overflow, value):
    """Written where due is not 0 and the step is taken; else not a bit of it changes."""
    call = call_in(form, "adamw", [(300,), (7,)], found_inf=scalar(overflow))
    told, updates = with_updates(call, due=due(value))
    if value != 0 and overflow == 0.0:
        old, new = before_and_after(call)
        told.run()
        check(updates, call, old, new)
    else:
        told.run()
        assert (updates == -7.0).all()
    call.run()
    assert all(map(same_bits, told.tensors(), call.tensors()))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("form", ["masters", "bfloat16", "float64"])
def test_threads(form, count, threads):
    """Sums are added up chunk by chunk, so the number of threads does not matter."""
    call = call_in(form, "adamw", [(100_003,), (32_769,), (9,)])
    threads(1)
    one, alone = with_updates(call)
    one.run()
    threads(count)
    many, together = with_updates(call)
    many.run()
    assert same_bits(alone, together)


def lamb(params, grads, moments, places=()):
    """Updates of a LAMB step with norms of a whole tensor, which rounds stochastically."""
    hyper = dict(zip(HYPER["lamb_"], (0.9, 0.99, 1e-8, 0.1, 1.0, inf, 1.0), strict=True))
    scalars = ops.step_scalars("lamb_", params.device, 1e-3, hyper, stochastic_rounding=True)
    states, updates = dict(zip(("exp_avgs", "exp_avg_sqs"), ([m] for m in moments), strict=True)), tally(1)
    squares = torch.tensor([[3.0, 5.0]], dtype=torch.float64)
    ops.step_lists("lamb_", [params], [grads], [], states, [scalar(3.0)], scalars, places=places,
                   squares=squares, updates=updates)  # fmt: skip
    return updates


def test_shards_and_given_norms():
    """A shard's updates are of its elements: those of all ranks add up to those of the whole tensor."""
    random = torch.Generator().manual_seed(0)
    weight, grad, mean, square = (torch.randn(600, generator=random) for _ in range(4))
    tensors = weight.bfloat16(), grad, mean, square.abs()
    whole, value = tensors[0].clone(), tensors[0].float()
    updates = lamb(whole, grad, [t.clone() for t in tensors[2:]])
    lamb(value, grad, [t.clone() for t in tensors[2:]])
    assert updates[0, :2].tolist() == wanted(tensors[0], tensors[0].float(), value)[:2]
    parts = torch.zeros(4, dtype=torch.float64)
    for begin, end in ((0, 256), (256, 600)):
        part, of_grad, *moments = (t[begin:end].clone() for t in tensors)
        parts += lamb(part, of_grad, moments, places=[begin, 0, 0])[0]
        assert same_bits(part, whole[begin:end].clone())
    assert torch.equal(parts[:2], updates[0, :2])
    torch.testing.assert_close(parts[2:], updates[0, 2:], rtol=1e-12, atol=0.0)


def test_unaligned_and_channels_last():
    random = torch.Generator().manual_seed(0)
    image = (
        torch.randn(4, 3, 9, 11, generator=random).bfloat16().contiguous(memory_format=torch.channels_last)
    )
    shifted = torch.randn(301, generator=random).bfloat16()[1:]
    call = StepCall("sgd_", [image, shifted], [image / 3, shifted / 3], [[]], [], [scalar(0.0), scalar(1.0)])
    call.options = dict(lr=1e-2)
    old, new = before_and_after(call)
    told, updates = with_updates(call)
    told.run()
    check(updates, call, old, new)


def test_the_version_of_updates_moves():
    call = call_in("masters", "sgd", [(3,)])
    told, updates = with_updates(call)
    before = updates._version
    told.run()
    assert updates._version > before


def test_step_tables():
    """A table of calls: a row of updates for each of its parameters, and none of its arguments without."""
    calls = [call_in("masters", "sgd", [(300,), (5,)]), call_in("masters", "adamw", [(70,)])]
    names = [{name: one for name, one in c.lists().items() if name not in RENAMED and one} for c in calls]
    hyper = [[0.0] * 4, [0.9, 0.99, 1e-8, 0.1]]
    table = StepTable(
        [
            ops.StepCall(c.op, c.params, c.grads, c.masters, states, c.steps, ops.step_scalars(
                c.op, torch.device("cpu"), 1e-3, dict(zip(HYPER[c.op], numbers, strict=True))))
            for c, states, numbers in zip(calls, names, hyper, strict=True)
        ]
    )  # fmt: skip
    updates = tally(3)
    before = updates._version
    table.step(table.params, DeviceInputs(), updates, due(0))
    assert (updates == -7.0).all()
    old = [value for c in calls for value in values(c)]
    found = [p.clone() for c in calls for p in c.params]
    table.step(table.params, DeviceInputs(), updates=updates, due=due(1))
    assert updates._version > before
    for row, weight, a, b in zip(updates, found, old, [v for c in calls for v in values(c)], strict=True):
        assert row[:2].tolist() == wanted(weight, a, b)[:2]
    with mock.patch.object(table, "_do") as do:
        table.step(table.params, DeviceInputs())
    assert not do.call_args.kwargs.keys() & {"updates", "due"}


def test_no_parameters():
    ops.sgd_([], [], [], [], [], lr=1.0, updates=tally(0), due=due())


def test_oracle():
    """The oracle itself, by hand: 1 + 2^-9 rounds to 1 in BF16, 1 + 2^-6 does not."""
    weight, old = torch.tensor([1.0, 1.0, 1.0], dtype=torch.bfloat16), torch.ones(3)
    new = torch.tensor([1.0, 1.0 + 2.0**-9, 1.0 + 2.0**-6])
    assert wanted(weight, old, new) == [2.0, 1.0, 2.0**-18 + 2.0**-12, 3.0]
    assert bits(weight).dtype == torch.int16
