"""update_scale_: torch's trajectory bit for bit, and the floor, the ceiling and hysteresis against a plain
model."""

import ctypes
import random

import pytest
import torch
from fusedamp import ops
from op_calls import Unchanged, same_bits, scalar

INF = float("inf")


def tracker(value=0):
    return torch.tensor(value, dtype=torch.int32)


def float32(x):
    return ctypes.c_float(x).value


class Model:
    """The rule in words."""

    def __init__(
        self, scale, *, growth, backoff, interval, floor=0.0, ceiling=INF, hysteresis=1, refill=False
    ):
        self.scale, self.good, self.budget = scale, 0, hysteresis
        self.growth, self.backoff, self.interval = growth, backoff, interval
        self.floor, self.ceiling, self.hysteresis, self.refill = floor, ceiling, hysteresis, refill

    def update(self, overflow):
        if overflow:
            self.good = 0
            self.budget = max(self.budget - 1, 0)
            if self.budget == 0:
                self.scale = max(float32(self.scale * self.backoff), min(self.floor, self.scale))
            return
        self.good += 1
        if self.refill:
            self.budget = self.hysteresis
        if self.good == self.interval:
            grown = float32(self.scale * self.growth)
            if grown > self.ceiling:
                grown = max(self.ceiling, self.scale)
            if grown < INF:
                self.scale = grown
            self.good, self.budget = 0, self.hysteresis


@pytest.mark.parametrize("seed", range(12))
def test_torch_trajectory_to_the_bit(seed):
    """Random overflows, factors and intervals; down into subnormals and zero, and up to where float32
    ends."""
    rng = random.Random(seed)
    growth, backoff = rng.choice([(2.0, 0.5), (1.7, 0.3), (1.001, 0.999), (10.0, 0.9)])
    interval, chance = rng.choice([1, 2, 5]), rng.choice([0.05, 0.3, 0.9])
    # Below the interval: beyond it torch never grows again.
    ours = [scalar(rng.choice([65536.0, 1.0, 1e-30, 1e38])), tracker(rng.randrange(interval))]
    theirs = [t.clone() for t in ours]
    for _ in range(400):
        found_inf = scalar(float(rng.random() < chance))
        ops.update_scale_(
            *ours, found_inf, growth_factor=growth, backoff_factor=backoff, growth_interval=interval
        )
        torch._amp_update_scale_(*theirs, found_inf, growth, backoff, interval)
        assert same_bits(ours[0], theirs[0])
        assert same_bits(ours[1], theirs[1])


@pytest.mark.parametrize("seed", range(30))
def test_floor_ceiling_and_hysteresis_follow_the_model(seed):
    rng = random.Random(seed)
    floor, ceiling = rng.choice(
        [(0.0, INF), (1.0, 2.0**20), (2.0**-126, 2.0**127), (2.0**15, 2.0**17), (3.0, 3.0 * 2**15)]
    )
    hysteresis, refill = rng.choice([1, 2, 3]), rng.random() < 0.5
    interval, chance = rng.choice([1, 2, 5]), rng.choice([0.05, 0.3, 0.9])
    model = Model(
        65536.0,
        growth=4.0,
        backoff=0.25,
        interval=interval,
        floor=floor,
        ceiling=ceiling,
        hysteresis=hysteresis,
        refill=refill,
    )
    scale, good, budget = scalar(65536.0), tracker(), tracker(hysteresis)
    for i in range(300):
        overflow = rng.random() < chance
        model.update(overflow)
        ops.update_scale_(
            scale,
            good,
            scalar(float(overflow)),
            growth_factor=4.0,
            backoff_factor=0.25,
            growth_interval=interval,
            min_scale=floor,
            max_scale=ceiling,
            hysteresis_tracker=budget,
            hysteresis=hysteresis,
            refill_on_good_step=refill,
        )
        assert (scale.item(), good.item(), budget.item()) == (model.scale, model.good, model.budget), (
            f"update {i}"
        )


def update(scale, good, found_inf, **options):
    defaults = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=3)
    ops.update_scale_(scale, good, scalar(found_inf), **(defaults | options))


@pytest.mark.parametrize("found", [1.0, 2.0, -1.0, 1e-40, INF, float("nan")])
def test_whatever_is_not_zero_is_an_overflow(found):
    scale, good = scalar(8.0), tracker(2)
    update(scale, good, found)
    assert (scale.item(), good.item()) == (4.0, 0)


def test_grows_exactly_after_the_interval():
    scale, good = scalar(8.0), tracker()
    seen = []
    for _ in range(7):
        update(scale, good, 0.0)
        seen.append((scale.item(), good.item()))
    assert seen == [(8.0, 1), (8.0, 2), (16.0, 0), (16.0, 1), (16.0, 2), (32.0, 0), (32.0, 1)]


@pytest.mark.parametrize("count", [2, 3, 5, 2**31 - 1])
def test_a_tracker_beyond_the_interval_grows(count):
    """After the user reduced the interval (torch's scale never grows again), up to int32's maximum."""
    scale, good = scalar(8.0), tracker(count)
    update(scale, good, 0.0)
    assert (scale.item(), good.item()) == (16.0, 0)


def test_the_longest_interval():
    scale, good = scalar(8.0), tracker(2**31 - 3)
    for wanted in ((8.0, 2**31 - 2), (16.0, 0)):
        update(scale, good, 0.0, growth_interval=2**31 - 1)
        assert (scale.item(), good.item()) == wanted


NAN = float("nan")


@pytest.mark.parametrize(
    ("option", "text"),
    [
        (dict(growth_factor=NAN), "growth_factor is nan; expected a number"),
        (dict(backoff_factor=NAN), "backoff_factor is nan; expected a number"),
        (dict(min_scale=NAN), "min_scale is nan; expected a number from 0 to inf"),
        (dict(min_scale=-1.0), "min_scale is -1.0; expected a number from 0 to inf"),
        (dict(max_scale=NAN), "max_scale is nan; expected a number from 0 to inf"),
        (dict(max_scale=-INF), "max_scale is -inf; expected a number from 0 to inf"),
        (dict(growth_interval=0), "growth_interval is 0; expected a whole number from 1 to 2**31 - 1"),
        (dict(growth_interval=-3), "growth_interval is -3; expected a whole number from 1"),
        (dict(growth_interval=2**31), "growth_interval is 2147483648; expected a whole number from 1"),
        (dict(growth_interval=2.0), "growth_interval is 2.0; expected a whole number from 1"),
        (dict(hysteresis=0), "hysteresis is 0; expected a whole number from 1"),
        (dict(hysteresis=2**32), "hysteresis is 4294967296; expected a whole number from 1"),
    ],
    ids=str,
)
def test_numbers_that_fit_nothing_are_refused(option, text):
    scale, good, budget = scalar(8.0), tracker(1), tracker(1)
    with pytest.raises(ValueError, match=r"^\[update_scale_\] ") as caught:
        update(scale, good, 0.0, hysteresis_tracker=budget, **option)
    assert text in str(caught.value)
    assert (scale.item(), good.item(), budget.item()) == (8.0, 1, 1)


def test_never_grows_to_infinity():
    scale, good = scalar(2.0**127), tracker(2)
    update(scale, good, 0.0)
    assert (scale.item(), good.item()) == (2.0**127, 0)


def test_the_floor_neither_lets_through_nor_raises():
    scale, good = scalar(4.0), tracker()
    for wanted in (2.0, 1.5, 1.5):
        update(scale, good, 1.0, min_scale=1.5)
        assert scale.item() == wanted
    low = scalar(0.25)  # set there by a user
    update(low, good, 1.0, min_scale=1.5)
    assert low.item() == 0.25


def test_the_ceiling_neither_lets_through_nor_lowers():
    scale = scalar(4.0)
    for wanted in (8.0, 10.0, 10.0):
        update(scale, tracker(2), 0.0, max_scale=10.0)
        assert scale.item() == wanted
    high = scalar(64.0)
    update(high, tracker(2), 0.0, max_scale=10.0)
    assert high.item() == 64.0


def test_found_inf_is_only_read_and_shapes_are_free():
    scale, good, found_inf = torch.full((1, 1), 8.0), torch.zeros(1, dtype=torch.int32), torch.ones(1)
    with Unchanged([found_inf]):
        ops.update_scale_(scale, good, found_inf, growth_factor=2.0, backoff_factor=0.5, growth_interval=3)
    assert scale.item() == 4.0
