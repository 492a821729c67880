"""update_scale_headroom_: the rule typed again in plain Python and compared after every step, its state, its
bounds, and what it refuses."""

import math
import random

import op_refusals
import pytest
import torch
from fusedamp import ops
from headroom_model import Model, floor_log2
from op_calls import Unchanged, scalar
from op_refusals import NO_DATA, bad_type, bad_value

INF, NAN = math.inf, math.nan


def fresh():
    return torch.zeros(ops.HEADROOM_STATE, dtype=torch.int32)


def check_state(state, model):
    numbers = state.tolist()
    head, counts = model.state()
    assert numbers[:5] == head
    assert numbers[6:8] == [0, 0]
    assert numbers[8:72] == counts
    kept, cursor = numbers[4], numbers[5]
    ring = numbers[72:]
    order = ring[cursor:] + ring[:cursor] if kept == 512 else ring[:kept]
    assert [b - 40 for b in order] == list(model.ring)


def update(scale, state, found_inf, largest, **options):
    defaults = dict(headroom_bits=2, growth_interval=2000)
    ops.update_scale_headroom_(
        scale, state, scalar(found_inf), scalar(largest, torch.float64), **(defaults | options)
    )


class Both:
    """The op and the model, side by side."""

    def __init__(self, scale, *, bits=2, interval=2000, floor=0.0, ceiling=INF):
        self.scale, self.state = scalar(scale), fresh()
        self.model = Model(self.scale.item(), bits=bits, interval=interval, floor=floor, ceiling=ceiling)
        self.options = dict(headroom_bits=bits, growth_interval=interval, min_scale=floor, max_scale=ceiling)

    def set_scale(self, value):
        self.scale.fill_(value)
        self.model.scale = self.scale.item()

    def set_interval(self, value):
        self.model.interval = self.options["growth_interval"] = value

    def step(self, overflow, largest):
        """``largest``: still scaled."""
        self.model.update(overflow, largest)
        update(self.scale, self.state, float(overflow), largest, **self.options)
        assert self.scale.item() == self.model.scale

    def train(self, unscaled):
        """A step with FP16 gradients, of which this is the largest."""
        largest = unscaled * self.model.scale
        self.step(overflow := largest >= 65520, INF if overflow else largest)
        return overflow


# What a user may set the scale to: powers of two and others, subnormal, at the ends, and no scale at all.
SCALES = [
    65536.0,
    65535.0,
    1.0,
    3.0,
    1e-30,
    2.0**-126,
    2.0**-149,
    1e-40,
    2.0**127,
    3.4e38,
    0.0,
    -4.0,
    INF,
    NAN,
]
BOUNDS = [
    (0.0, INF),
    (2.0**-126, 2.0**24),
    (1.0, 2.0**20),
    (3.0, 3.0 * 2**15),
    (2.0**10, 2.0**10),
    (1e-45, 1.0),
    (2.0**127, INF),
    (0.0, 2.0**-126),
]


def largest_gradients(rng, steps):
    """Unscaled: bursts, shifts, zeros, numbers next to powers of two, and far outside of -40..23."""
    level, burst = rng.uniform(-12, 4), 0
    for _ in range(steps):
        level += rng.choice([0.0, 0.0, 0.05, -0.05])
        if rng.random() < 0.002:
            level += rng.choice([-12, -6, 6, 10])
        burst = rng.randrange(1, 60) if rng.random() < 0.003 else max(burst - 1, 0)
        kind = rng.random()
        if kind < 0.02:
            yield 0.0
        elif kind < 0.03:
            yield 2.0 ** rng.uniform(-200, 60)
        elif kind < 0.06:
            yield math.nextafter(2.0 ** round(level), rng.choice([0.0, INF]))
        else:
            yield 2.0 ** (level + rng.gauss(0, 0.7) + 10 * (burst > 0))


@pytest.mark.parametrize("seed", range(16))
def test_every_step_follows_the_rule(seed):
    """3,000 steps of training; the scale is set from outside, and the interval changes."""
    rng = random.Random(seed)
    floor, ceiling = BOUNDS[seed % len(BOUNDS)]
    both = Both(
        rng.choice(SCALES),
        bits=rng.choice([0, 1, 2, 3, 14]),
        interval=rng.choice([1, 7, 63, 64, 65, 200, 2000, 2**31 - 1]),
        floor=floor,
        ceiling=ceiling,
    )
    for step, unscaled in enumerate(largest_gradients(rng, 3000)):
        if rng.random() < 0.003:
            both.set_scale(rng.choice(SCALES))
        if rng.random() < 0.003:
            both.set_interval(rng.choice([1, 20, 150, 500, 2**31 - 1]))
        if rng.random() < 0.01:
            both.step(rng.random() < 0.7, rng.choice([0.0, 1.0, INF, NAN, 5e-324, 1.7e308]))
        else:
            both.train(unscaled)
        if step % 97 == 0 or step > 2990:
            check_state(both.state, both.model)


@pytest.mark.parametrize("overflows", [1, 2, 3, 4, 200])
def test_overflows_in_a_row(overflows):
    """Down by 1, 2, 4, 4 ... and one doubling of the patience."""
    both, exponents = Both(2.0**100), []
    for _ in range(overflows):
        both.step(True, INF)
        exponents.append(floor_log2(both.scale.item()))
    assert exponents[:4] == [99, 97, 93, 89][:overflows]
    assert exponents[-1] >= -126
    assert both.state[3].item() == 128
    both.step(False, 1.0)
    check_state(both.state, both.model)


def test_patience_doubles_to_the_interval_and_comes_back():
    both, seen = Both(2.0**60, interval=300), []
    for _ in range(5):
        both.step(True, INF)
        both.step(False, 0.0)
        seen.append(both.state[3].item())
    assert seen == [128, 256, 300, 300, 300]
    for _ in range(4 * 300):
        both.step(False, 0.0)
        seen.append(both.state[3].item())
    check_state(both.state, both.model)
    assert seen[-1] == 64
    assert [seen.count(n) for n in (150, 75)] == [300, 300]


def test_grows_one_bit_per_patience_and_comes_down_at_once():
    both = Both(2.0**10)
    for _ in range(64 * 3):
        both.train(1.0)
    assert both.scale.item() == 2.0**13  # want: 15 - 0 - 2
    for _ in range(200):
        both.train(1.0)
    assert both.scale.item() == 2.0**13
    both.train(4.0)  # of 256 to 511 steps, one may be an outlier
    assert both.scale.item() == 2.0**13
    both.train(4.0)
    assert both.scale.item() == 2.0**11


def test_two_outliers_of_512_are_ignored_three_are_not():
    both = Both(2.0**13)
    for _ in range(512):
        both.train(1.5)
    for outliers in (1, 2, 3):
        both.train(3.0)
        assert both.scale.item() == (2.0**12 if outliers == 3 else 2.0**13)
    for _ in range(511):  # the oldest two leave the window
        both.train(1.5)
    assert both.state[8 + 41].item() == 1
    check_state(both.state, both.model)


def test_nothing_is_kept_of_steps_without_a_largest():
    both = Both(1000.0)
    for largest in (0.0, INF, NAN):
        both.step(False, largest)
        assert both.scale.item() == 512.0  # rounded down, and left there
        assert both.state[4].item() == 0
    for value in (0.0, -4.0, INF, NAN):
        both.set_scale(value)
        both.step(False, 1.0)
        assert both.scale.item() == 2.0 ** (127 if value == INF else -126)
        assert both.state[4].item() == 0


@pytest.mark.parametrize("scale", [1.0, 1.0 + 2**-23, 2.0 - 2**-23, 3.0, 2.0**-149, 7.0 * 2**-149, 3.4e38])
@pytest.mark.parametrize("power", [-40, -39, 0, 22, 23])
def test_gradients_next_to_a_power_of_two(scale, power):
    """The quotient is exact: the nearest doubles on both sides of scale * 2^power."""
    edge = scalar(scale).item() * 2.0**power
    for largest in (math.nextafter(edge, 0.0), edge, math.nextafter(edge, INF)):
        both = Both(scale)
        both.step(False, largest)
        check_state(both.state, both.model)


def test_fp64_gradients_of_any_size():
    for largest, wanted in (
        (5e-324, 0),
        (2.0**-41, 0),
        (2.0**-40, 0),
        (2.0**23, 63),
        (2.0**24, 63),
        (1.7e308, 63),
    ):
        both = Both(1.0)
        both.step(False, largest)
        assert both.state[72].item() == wanted
        check_state(both.state, both.model)


@pytest.mark.parametrize("found", [1.0, 2.0, -1.0, 1e-40, INF, NAN])
def test_whatever_is_not_zero_is_an_overflow(found):
    scale, state = scalar(8.0), fresh()
    update(scale, state, found, 1.0)
    assert (scale.item(), state[:5].tolist()) == (4.0, [1, 0, 0, 128, 0])


def test_inputs_are_only_read_and_shapes_are_free():
    scale, state = torch.full((1, 1), 8.0), fresh()
    found_inf, largest = torch.zeros(1), torch.full((1, 1, 1), 2.0**20, dtype=torch.float64)
    with Unchanged([found_inf, largest]):
        ops.update_scale_headroom_(scale, state, found_inf, largest)
    assert scale.item() == 2.0**-4  # 15 - 17 - 2


def test_any_memory_of_an_int32_list_is_a_state():
    """What else wrote the state, it harms nothing outside of it."""
    memory = torch.full((3 * ops.HEADROOM_STATE,), -1, dtype=torch.int32)
    state = memory[ops.HEADROOM_STATE : 2 * ops.HEADROOM_STATE]
    for junk in (-1, 2**31 - 1, -(2**31), 600, 12345678):
        state.fill_(0)
        state[5], state[72:] = junk, junk
        state[4] = 512
        update(scalar(8.0), state, 0.0, 1.0)
        assert (memory[: ops.HEADROOM_STATE] == -1).all()
        assert (memory[2 * ops.HEADROOM_STATE :] == -1).all()


WHOLE = "a whole number from "
BAD = {
    "scale": bad_value(dict(scale=torch.ones(2)), "scale is float32 of shape [2]; expected one float32"),
    "scale dtype": bad_value(dict(scale=scalar(1.0, torch.float64)), "scale is float64 of shape []"),
    "scale kind": bad_type(dict(scale=1.0), "scale is a float; expected a tensor"),
    "scale meta": bad_value(dict(scale=scalar(1.0).to("meta")), "scale is " + NO_DATA),
    "state length": bad_value(
        dict(state=fresh()[:583]), "state is int32 of shape [583]; expected int32 of shape [584]. Start with"
    ),
    "state shape": bad_value(dict(state=fresh().view(8, 73)), "state is int32 of shape [8, 73]; expected"),
    "state dtype": bad_value(dict(state=fresh().long()), "state is int64 of shape [584]; expected int32"),
    "state gaps": bad_value(
        dict(state=torch.zeros(584, 2, dtype=torch.int32)[:, 0]), "state (shape [584], strides [2]) has gaps"
    ),
    "state sparse": bad_value(dict(state=fresh().to_sparse()), "state is sparse (torch.sparse_coo)"),
    "state kind": bad_type(dict(state=[0] * 584), "state is a list; expected a tensor"),
    "found_inf": bad_value(dict(found_inf=torch.zeros(0)), "found_inf is float32 of shape [0]; expected one"),
    "found_inf meta": bad_value(dict(found_inf=torch.zeros((), device="meta")), "found_inf is " + NO_DATA),
    "largest dtype": bad_value(
        dict(largest=scalar(1.0)), "largest is float32 of shape []; expected one float64 element"
    ),
    "largest shape": bad_value(
        dict(largest=torch.ones(2, dtype=torch.float64)), "largest is float64 of shape [2]; expected one"
    ),
    "largest None": bad_type(dict(largest=None), "largest is None; expected a tensor"),
    "bits -1": bad_value(dict(headroom_bits=-1), f"headroom_bits is -1; expected {WHOLE}0 to 14"),
    "bits 15": bad_value(dict(headroom_bits=15), f"headroom_bits is 15; expected {WHOLE}0 to 14"),
    "bits 2.0": bad_value(dict(headroom_bits=2.0), f"headroom_bits is 2.0; expected {WHOLE}0 to 14"),
    "bits True": bad_value(dict(headroom_bits=True), f"headroom_bits is True; expected {WHOLE}0 to 14"),
    "interval": bad_value(dict(growth_interval=0), f"growth_interval is 0; expected {WHOLE}1 to 2**31 - 1"),
    "interval kind": bad_value(dict(growth_interval="7"), f"growth_interval is '7'; expected {WHOLE}1 to"),
    "min": bad_value(dict(min_scale=-1.0), "min_scale is -1.0; expected a number from 0 to inf"),
    "min nan": bad_value(dict(min_scale=NAN), "min_scale is nan; expected a number from 0 to inf"),
    "max": bad_value(dict(max_scale=NAN), "max_scale is nan; expected a number from 0 to inf"),
    "max kind": bad_type(dict(max_scale=None), "max_scale is None; expected a number"),
    "no power": bad_value(
        dict(min_scale=5.0, max_scale=7.0),
        "min_scale is 5 and max_scale 7; expected a power of two from 2^-126 to 2^127 between them. Use",
    ),
    "crossed": bad_value(dict(min_scale=8.0, max_scale=4.0), "min_scale is 8 and max_scale 4; expected a"),
    "max 0": bad_value(dict(max_scale=0.0), "min_scale is 0 and max_scale 0; expected a power of two"),
    "subnormal": bad_value(dict(max_scale=1e-39), "min_scale is 0 and max_scale 1e-39; expected a power"),
    "beyond FP32": bad_value(dict(min_scale=1e39), "min_scale is 1e+39 and max_scale inf; expected a power"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_refused(name):
    tensors = dict(
        scale=scalar(8.0), state=fresh(), found_inf=scalar(1.0), largest=scalar(1.0, torch.float64)
    )
    arguments = tensors | dict(headroom_bits=2, growth_interval=3) | BAD[name].change
    op_refusals.check(
        lambda: ops.update_scale_headroom_(**arguments), tensors.values(), "update_scale_headroom_", BAD[name]
    )
