"""Shards of a tensor draw the random numbers of their places in the whole: stepping the parts gives the bits
of stepping the whole, however it is cut.
"""

import itertools

import op_refusals
import pytest
import torch
from fusedamp import ops
from op_calls import same_bits, scalar, step_call
from op_refusals import bad_type, bad_value, option

ROWS, COLUMNS = 13, 37
KEY = 2**34  # elements that share a key of random numbers (csrc/math/random.h)


def cuts():
    """Rows and columns of a part, and its place: ranges of rows, of columns, of both; odd and even starts."""
    for rows, columns in itertools.product(
        [(0, 13), (0, 5), (5, 6), (6, 13), (4, 8)], [(0, 37), (0, 1), (1, 4), (12, 36), (20, 28), (36, 37)]
    ):
        (top, bottom), (left, right) = rows, columns
        run = right - left
        place = (top * COLUMNS + left, 0 if run == COLUMNS or bottom - top == 1 else run, COLUMNS)
        yield pytest.param(rows, columns, place, id=f"{rows}x{columns}")


def stepped(weight, grad, momentum, places=(), steps=3, dtype=torch.bfloat16):
    """The weight and the momentum after steps that round both stochastically."""
    weight, momentum = weight.clone(), momentum.clone()
    count = [scalar(7.0)]
    for _ in range(steps):
        ops.sgd_(
            [weight], [grad], [momentum], [], count, lr=0.1, momentum=0.9, seeds=[5], places=places,
            stochastic_rounding=True,
        )  # fmt: skip
    return weight, momentum


def inputs(dtype, shape=(ROWS, COLUMNS)):
    random = torch.Generator().manual_seed(0)
    weight, grad, momentum = (torch.randn(shape, generator=random) for _ in range(3))
    return weight.to(dtype), grad, momentum.bfloat16()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("rows", "columns", "place"), list(cuts()))
def test_parts_step_as_the_whole(rows, columns, place, dtype):
    """Guards every cut, and that places matter: without one, odd and even parts draw other numbers."""
    tensors = inputs(dtype)
    whole = stepped(*tensors)
    part = [t[slice(*rows), slice(*columns)].contiguous() for t in tensors]
    for got, wanted in zip(stepped(*part, places=place), whole, strict=True):
        assert same_bits(got, wanted[slice(*rows), slice(*columns)].contiguous())
    if part[0].numel() > 100 and place[0] > 0:
        assert not same_bits(stepped(*part)[1], whole[1][slice(*rows), slice(*columns)].contiguous())


@pytest.mark.parametrize("size", [1, 2, 127, 70_001])
@pytest.mark.parametrize("first", [0, 1, 2, 999, 2**31 + 1, KEY - 5, KEY - 2, KEY, 3 * KEY + 1])
def test_places_of_large_tensors(first, size):
    """Guards chunks and keys: a part that crosses 2^33 elements is two parts."""
    tensors = inputs(torch.bfloat16, (size,))
    whole = stepped(*tensors, places=(first, 0, 0))
    for at in {min(size, cut) for cut in (1, 2, 5, 64, 32 * 1024 + 1)}:
        for part, begin in ((slice(0, at), first), (slice(at, size), first + at)):
            got = stepped(*(t[part].clone() for t in tensors), places=(begin, 0, 0))
            assert all(same_bits(a, b[part]) for a, b in zip(got, whole, strict=True))


@pytest.mark.parametrize("run", [1, 2, 3, 4, 8, 31])
@pytest.mark.parametrize("first", [0, 1, KEY - 40])
def test_runs_in_large_tensors(first, run):
    """Guards runs that are far apart: each is a part of its own."""
    count, stride = 9, 2**31 + 6
    tensors = inputs(torch.bfloat16, (count, run))
    got = stepped(*tensors, places=(first, run, stride))
    for i in range(count):
        one = stepped(*(t[i].clone() for t in tensors), places=(first + i * stride, 0, 0))
        assert all(same_bits(a, b[i]) for a, b in zip(one, got, strict=True))


def test_8_bit_states_of_whole_blocks():
    """Parts of whole blocks have the values and scales of the whole tensor."""
    random = torch.Generator().manual_seed(0)
    grad = torch.randn(6, 128, generator=random)

    def quantized(grad, places=()):
        codes, scales = torch.zeros(grad.shape, dtype=torch.int8), torch.zeros(grad.numel() // 128)
        weight, count = torch.zeros(grad.shape), [scalar(0.0)]
        for _ in range(3):
            ops.sgd_(
                [weight], [grad], [codes], [], count, lr=0.1, momentum=0.9, scales=[scales], places=places
            )
        return codes, scales, weight

    whole = quantized(grad)
    for begin, end in ((0, 2), (2, 3), (3, 6)):
        part = quantized(grad[begin:end].clone(), (begin * 128, 0, 0))
        for got, wanted in zip(part, whole, strict=True):
            assert torch.equal(got, wanted[begin:end])


PLACES = {
    "number": bad_type(option(places=3), "places is 3; expected a list of whole numbers"),
    "float in it": bad_type(option(places=[0, 0.0] * 3), "places[1] is 0.0; expected a whole number from"),
    "few": bad_value(option(places=[0, 0, 0]), "places has 3 numbers; expected 6, three per param, or none"),
    "negative": bad_value(option(places=[0, 0, 0, -1, 0, 0]), "places of params[1] are -1, 0, 0; expected"),
    "runs meet": bad_value(option(places=[0, 4, 3, 0, 0, 0]), "places of params[0] are 0, 4, 3; expected"),
    "too far": bad_value(option(places=[0, 1, 2**62, 0, 0, 0]), "places of params[0] are 0, 1, 4611686018"),
}


@pytest.mark.parametrize("name", PLACES)
def test_refusals(name):
    call = step_call("adamw", [(4,), (4,)], torch.bfloat16, masters=True)
    tensors = call.tensors()
    PLACES[name].change(call)
    op_refusals.check(call.run, tensors, "adamw_", PLACES[name])
