"""Comparisons: order of the windows, ratios of rounds, and when there is no verdict."""

import re

import pytest
import torch
from fusedamp import energy
from fusedamp.energy import comparison

pytestmark = pytest.mark.host

LATE = 1.055  # a window of 2 s ends up to a tick of 0.1 s later, and reads take 1 ms


class Step:
    """An arm: takes ``seconds`` at ``watts``."""

    def __init__(self, clock, meter, name, seconds, watts, calls):
        self.clock, self.meter, self.name = clock, meter, name
        self.seconds, self.watts, self.calls = seconds, watts, calls

    def __call__(self):
        self.meter.watts = self.watts
        self.clock.sleep(self.seconds)
        self.calls.append(self.name)


@pytest.fixture
def steps(clock, devices, meter):
    """Return a function that makes two arms, 8 J and 4 J per call."""
    shown, calls = meter(devices[0]), []

    def make(b_watts=200.0):
        arms = {"a": Step(clock, shown, "a", 0.02, 400.0, calls)}
        arms["b"] = Step(clock, shown, "b", 0.02, b_watts, calls)
        return arms

    make.calls, make.device = calls, devices[0]
    return make


@pytest.fixture
def at_entry(monkeypatch):
    """Return a function: its argument is called before each window begins."""
    enter = energy.Window.__enter__

    def use(call):
        monkeypatch.setattr(energy.Window, "__enter__", lambda window: (call(), enter(window))[1])

    return use


def compare(arms, **options):
    return energy.compare(arms, **{"samples": 4, "devices": ["GPU-aa"], "seconds": 2.0, **options})


def test_joules_per_sample(steps):
    c = compare(steps())
    assert 2.0 <= c.medians["a"] <= 2.0 * LATE
    assert 1.0 <= c.medians["b"] <= 1.0 * LATE
    assert c.ratio("a", "b") == pytest.approx((2.0, 2.0, 2.0), rel=2e-3)
    assert c.ratio("b", "a").median == pytest.approx(0.5, rel=2e-3)
    assert c.verdict("a", "b").startswith("b needs less energy: a / b is ")
    assert c.verdict("b", "a").startswith("b needs less energy: b / a is ")
    assert [len(arm.watts) for arm in c.arms.values()] == [5, 5]
    assert c.arms["a"].watts == pytest.approx([400.0] * 5, rel=2e-3)
    assert c.arms["b"].seconds_per_sample == pytest.approx([0.005] * 5, rel=0.06)
    assert (c.devices, c.others) == (("GPU-aa",), 0)


def test_the_order_is_abba(steps, at_entry):
    """An unmeasured window of each comes first. Each round is the mirror image of the round before."""
    seen = []
    at_entry(lambda: seen.append(len(steps.calls)))
    compare(steps(), rounds=4)
    assert seen[0] >= 200  # 2 s of each arm, 20 ms per call
    assert "".join(steps.calls[at] for at in seen) == "abbaabba"


def test_the_host_waits_now_and_then(steps, gpus):
    """The host does not queue more than about a quarter of a window."""
    waits = gpus("aa", used=[0])
    compare(steps(), rounds=3)
    windows = 2 * 3
    assert 4 <= (len(waits) - 2 * windows) / windows <= 32


def test_an_arm_that_compiles_first(steps, gpus, clock):
    """Its first call takes longer than its warm-up; then the host waits as rarely as for others."""
    waits, arms = gpus("aa", used=[0]), steps()
    slow = iter([60.0])
    arms["a"] = lambda step=arms["a"]: (clock.sleep(next(slow, 0.0)), step())
    compare(arms, rounds=3)
    windows = 2 * 3
    assert (len(waits) - 2 * windows) / windows <= 32


def test_arms_that_do_the_same_are_inconclusive(steps, at_entry):
    arms = steps(b_watts=400.0)
    factors = iter([1.01, 1.0, 0.98, 1.0, 1.02, 1.0, 0.99, 1.0, 1.0, 1.0])
    at_entry(lambda: setattr(arms["b"], "watts", 400.0 * next(factors)))
    c = compare(arms)
    assert c.verdict("a", "b").startswith("inconclusive: a / b is 1")
    assert c.verdict("a", "a").startswith("inconclusive")


def made(a, b, warm=None, warmer=None):
    arms = {
        name: comparison.Arm(tuple(values), (0.001,) * len(values), (100.0,) * len(values), celsius or {})
        for name, values, celsius in [("a", a, warm), ("b", b, warmer)]
    }
    return energy.Comparison(arms, ("gpu",), None)


def test_ratios_are_of_rounds():
    """Both arms drift by a factor of 9, and their ratio does not."""
    c = made([1.1, 2.2, 3.3, 6.6, 9.9], [1.0, 2.0, 3.0, 6.0, 9.0])
    assert c.ratio("a", "b") == pytest.approx((1.1, 1.1, 1.1))
    assert c.verdict("a", "b") == "b needs less energy: a / b is 1.1 (quartiles 1.1 to 1.1)"


@pytest.mark.parametrize(
    ("ratios", "quartiles", "conclusive"),
    [
        ([0.9, 1.1, 1.2, 1.3, 1.4], (1.2, 1.1, 1.3), True),
        ([0.8, 0.9, 1.2, 1.3, 1.4], (1.2, 0.9, 1.3), False),
        ([0.8, 1.0, 1.2, 1.3, 1.4], (1.2, 1.0, 1.3), False),
        ([0.6, 0.7, 0.8, 1.0, 1.4], (0.8, 0.7, 1.0), False),
        ([0.6, 0.7, 0.8, 0.9, 1.4], (0.8, 0.7, 0.9), True),
    ],
)
def test_quartiles(ratios, quartiles, conclusive):
    c = made(ratios, [1.0] * 5)
    assert c.ratio("a", "b") == pytest.approx(quartiles)
    assert c.verdict("a", "b").startswith("inconclusive: a / b is ") is not conclusive


@pytest.mark.parametrize(("warmer", "conclusive"), [(65.0, True), (65.1, False), (54.9, False)])
def test_temperatures(warmer, conclusive):
    c = made([2.0] * 5, [1.0] * 5, {"gpu": 60.0}, {"gpu": warmer})
    assert c.verdict("a", "b").startswith("b needs less") is conclusive
    assert c.verdict("b", "a").startswith("b needs less") is conclusive
    if not conclusive:
        expected = f"inconclusive: gpu had 60 °C in a and {warmer:.0f} °C in b"
        assert c.verdict("a", "b").startswith(expected)


def test_a_device_that_warms_up(steps, clock, at_entry):
    """Temperatures are read at both ends of each window."""
    arms = steps()

    class Hot(Step):
        def __call__(self):
            super().__call__()
            steps.device.celsius = 70

    arms["b"] = Hot(clock, arms["b"].meter, "b", 0.02, 200.0, steps.calls)
    at_entry(lambda: setattr(steps.device, "celsius", 50))
    c = compare(arms, rounds=3)
    assert c.arms["a"].temperatures == {"GPU-aa": 50.0}
    assert c.arms["b"].temperatures == {"GPU-aa": 60.0}
    assert c.verdict("a", "b").startswith("inconclusive: GPU-aa had 50 °C in a and 60 °C in b")


def test_the_table(steps):
    c = compare(steps())
    lines = str(c).splitlines()
    assert lines[0] == "Energy of GPU-aa: medians of 5 rounds; J and ms are per sample"
    assert lines[1].split() == ["arm", "J", "quartiles", "ms", "W", "°C"]
    name, joules, low, to, high, milliseconds, watts, celsius = lines[2].split()
    assert (name, to, celsius) == ("a", "to", "60")
    assert float(watts) == pytest.approx(400.0, rel=2e-3)
    assert 2.0 <= float(low) <= float(joules) <= float(high) <= 2.0 * LATE
    assert 5.0 <= float(milliseconds) <= 5.0 * LATE
    assert lines[-1] == "Other processes on a device: 0 at most"
    assert all(len(line) <= 80 for line in lines)


def test_what_cannot_be_seen_is_said():
    lines = str(made([1.0] * 3, [1.0] * 3)).splitlines()
    assert lines[2].endswith("-")
    assert lines[-1] == "Other processes on a device: cannot be seen here"


def test_company(steps):
    steps.device.run(7)
    with pytest.warns(UserWarning, match="other processes use GPU-aa"):
        c = compare(steps(), rounds=3)
    assert c.others == 1


def test_cpu_packages(clock, powercap, meter):
    shown = meter(powercap("intel-rapl:0", "package-0"), tick=0.001)
    arms = {"a": Step(clock, shown, "a", 0.5, 100.0, []), "b": Step(clock, shown, "b", 0.25, 100.0, [])}
    c = energy.compare(arms, samples=1, seconds=2.0, devices=["cpu"])
    assert c.ratio("a", "b").median == pytest.approx(2.0, rel=5e-3)
    assert c.devices == ("package-0",)


def test_an_arm_that_takes_longer_than_a_window(steps, clock):
    arms = steps()
    arms["a"].seconds = 7.0
    c = compare(arms, rounds=3, samples=1)
    assert 2800.0 <= c.medians["a"] <= 2800.0 * (1 + 0.1 / 7)


def test_an_arm_that_raises(steps):
    def fails():
        raise KeyError("theirs")

    with pytest.raises(KeyError, match="theirs"):
        compare({**steps(), "c": fails})


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"arms": [len, len]}, TypeError, "arms is [<built-in"),
        ({"arms": {"a": 1, "b": len}}, TypeError, "expected a dict of functions by name"),
        ({"arms": {"a": len}}, ValueError, "expected at least two arms; energy.window measures one"),
        ({"samples": 0}, ValueError, "samples is 0; expected a whole number from 1 to"),
        ({"samples": "4"}, TypeError, "samples is '4'; expected a number"),
        ({"seconds": 1.9}, ValueError, "seconds is 1.9; expected a finite number >= 2"),
        ({"seconds": float("inf")}, ValueError, "seconds is inf; expected a finite number"),
        ({"seconds": float("nan")}, ValueError, "seconds is nan; expected a finite number"),
        ({"rounds": 2}, ValueError, "rounds is 2; expected a whole number from 3 to"),
        ({"rounds": 3.5}, ValueError, "rounds is 3.5; expected a whole number"),
    ],
)
def test_arguments(steps, options, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as raised:
        compare(options.pop("arms", steps()), **options)
    assert str(raised.value).startswith("[energy.compare] ")
    assert steps.calls == []


def test_an_unknown_arm():
    c = made([1.0] * 3, [1.0] * 3)
    for call in (c.ratio, c.verdict):
        with pytest.raises(ValueError, match=r"\[Comparison\] arm is 'fp8'; expected one of a, b"):
            call("a", "fp8")


def test_numbers_may_be_tensors(steps):
    assert 2.0 <= compare(steps(), samples=torch.tensor(4), rounds=3).medians["a"] <= 2.0 * LATE
