"""The replays of loss-scale policies: the committed results are what the code gives; its parts are tested."""

import itertools
import math
import sys
from pathlib import Path
from random import Random

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the benchmarks are not part of the package

from benchmarks import scale_policies as replays  # noqa: E402


def committed(names):
    return [row for row in replays.read_table() if row["scenario"] in names]


def test_the_table_replays():
    """All policies on both traces; the other scenarios differ in their shifts only."""
    names = (replays.AS_RECORDED, "step of +10 bits", "heavy tails: 0.7 bits times t(2)")
    assert list(replays.records(names)) == committed(names)


def test_the_report_shows_the_table():
    rows = replays.read_table()
    assert replays.TABLE.with_suffix(".md").read_text() == replays.report(rows)
    found = {(row["network"], row["scenario"], row["policy"]) for row in rows}
    names = (replays.AS_RECORDED, *replays.SCENARIOS)
    assert found == set(itertools.product(replays.RECORDED, names, replays.POLICIES))


def test_the_record_is_of_the_demo_network():
    pytest.importorskip("sklearn")
    before = torch.random.get_rng_state()
    for new, old in zip(replays.record("digits", 3), replays.read_traces()["digits"], strict=False):
        assert new == pytest.approx(old, rel=0.01)
    torch.random.set_rng_state(before)
    lengths = {name: len(trace) for name, trace in replays.read_traces().items()}
    assert lengths == replays.RECORDED


@pytest.mark.parametrize(
    ("largest", "best"), [(1.0, 15), (65519.0, 0), (65520.0, -1), (32760.0, 0), (2.0**-20, 35)]
)
def test_the_best_power_of_two(largest, best):
    for step in (replays.Step(largest, 0.0), replays.Step(largest / 2, largest)):
        assert step.best == best


class Fixed(replays.Policy):
    def __init__(self, scale):
        self.scale, self.seen = scale, []

    def update(self, overflow, largest):
        self.seen.append((overflow, largest))


def test_what_a_replay_counts():
    policy = Fixed(8.0)
    steps = [replays.Step(1.0, 2.0), replays.Step(1.0, 8190.0), replays.Step(2.0**-10, 0.0)]
    skips, bits = replays.replay(policy, steps)
    assert policy.seen == [(False, 1.0), (True, 1.0), (False, 2.0**-10)]
    assert (skips, bits) == (1, ((14 - 3) + (25 - 3)) / 2)


def test_megatron_forgives_one_overflow():
    policy, scales = replays.POLICIES["Megatron"](), []
    for overflow in (True, True, True, *[False] * 1000, True, True):
        policy.update(overflow, 1.0)
        scales.append(math.log2(policy.scale))
    assert scales[:3] == [32, 31, 30]
    assert scales[-4:] == [30, 31, 31, 30]


def test_logmax_is_three_deviations_below_the_ceiling():
    policy = replays.POLICIES["LogMax"]()
    policy.update(False, 0.25)
    assert policy.scale == pytest.approx(2.0**18)  # one maximum: no deviation
    random = Random(0)
    for _ in range(20_000):
        policy.update(False, 2.0 ** (-3 + replays.normal(random)))
    assert math.log2(policy.scale) == pytest.approx(16 + 3 - 3.09, abs=0.5)
    policy.update(True, 0.25)
    assert 1.0 <= policy.scale < 2.0**15.9


def test_draws_have_their_distributions():
    random = Random(0)
    drawn = sorted(replays.t2(random) for _ in range(20_000))
    for quantile, wanted in ((0.1, -1.886), (0.5, 0.0), (0.9, 1.886)):  # tables of Student's t
        assert drawn[int(quantile * len(drawn))] == pytest.approx(wanted, abs=0.06)
    steps = replays.scenario("+4 bits in 2 % of steps", [replays.Step(1.0, 0.5)] * 2)
    assert {step.weights for step in steps} == {1.0, 16.0}
    assert sum(step.weights > 1 for step in steps) == pytest.approx(400, abs=80)
    assert all(step.activations == step.weights / 2 for step in steps)
