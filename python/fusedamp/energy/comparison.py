"""Variants of a step against each other: joules per sample, in alternating windows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from ..ops import checks
from .counter import Counter
from .devices import counters_of, synchronize
from .windows import MOST_SAMPLES, Window

WHERE = "[energy.compare]"
LEAST_SECONDS = 2.0  # of a window: twenty ticks
LEAST_ROUNDS = 3
WARMEST = 5.0  # degrees by which arms may differ
SLICES = 8  # of a window, between which the host waits for the device


def quartiles(values: Sequence[float]) -> list[float]:
    """Return lower quartile, median and upper quartile."""
    from statistics import quantiles  # takes as long to import as the rest of the room

    return quantiles(values, n=4, method="inclusive")


class Ratio(NamedTuple):
    """Median and quartiles of the ratios of the rounds."""

    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.4g} (quartiles {self.low:.4g} to {self.high:.4g})"


@dataclass(frozen=True)
class Arm:
    """What was measured of one arm, one value per round; ``temperatures``: medians by device, in Celsius."""

    joules_per_sample: tuple[float, ...]
    seconds_per_sample: tuple[float, ...]
    watts: tuple[float, ...]
    temperatures: dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Made by `compare`. ``print`` it for a table.

    Attributes:
        arms: name -> `Arm`.
        devices: names of the devices, whose energy is added up.
        others: largest number of other processes on a GPU; None if they cannot be seen.
    """

    arms: dict[str, Arm]
    devices: tuple[str, ...]
    others: int | None

    @property
    def medians(self) -> dict[str, float]:
        """Median joules per sample of each arm."""
        return {name: quartiles(arm.joules_per_sample)[1] for name, arm in self.arms.items()}

    def ratio(self, a: str, b: str) -> Ratio:
        """Return joules per sample of ``a`` over those of ``b``: median and quartiles of the rounds'
        ratios."""
        pairs = zip(self._arm(a).joules_per_sample, self._arm(b).joules_per_sample, strict=True)
        low, middle, high = quartiles([one / other for one, other in pairs])
        return Ratio(middle, low, high)

    def verdict(self, a: str, b: str) -> str:
        """Say which arm needs less energy; or "inconclusive: ..." if the quartiles of the ratio include 1, or
        the arms' temperatures differ by more than 5 degrees Celsius on a device."""
        ratio = self.ratio(a, b)
        warm, warmer = self._arm(a).temperatures, self._arm(b).temperatures
        for device in warm.keys() & warmer.keys():
            if abs(warm[device] - warmer[device]) > WARMEST:
                return (
                    f"inconclusive: {device} had {warm[device]:.0f} °C in {a} and {warmer[device]:.0f} °C "
                    f"in {b}. Take shorter windows and more rounds"
                )
        if ratio.low <= 1 <= ratio.high:
            return f"inconclusive: {a} / {b} is {ratio}. Take more rounds or longer windows"
        return f"{b if ratio.low > 1 else a} needs less energy: {a} / {b} is {ratio}"

    def __str__(self) -> str:
        width = max(5, *map(len, self.arms))
        rounds = len(next(iter(self.arms.values())).watts)
        lines = [
            f"Energy of {', '.join(self.devices)}: medians of {rounds} rounds; J and ms are per sample",
            f"{'arm':{width}}  {'J':>10}  {'quartiles':>24}  {'ms':>10}  {'W':>6}  {'°C':>4}",
        ]
        for name, arm in self.arms.items():
            low, middle, high = quartiles(arm.joules_per_sample)
            milliseconds = 1e3 * quartiles(arm.seconds_per_sample)[1]
            celsius = f"{max(arm.temperatures.values()):.0f}" if arm.temperatures else "-"
            lines.append(
                f"{name:{width}}  {middle:10.4g}  {f'{low:.4g} to {high:.4g}':>24}  {milliseconds:10.4g}  "
                f"{quartiles(arm.watts)[1]:6.4g}  {celsius:>4}"
            )
        seen = "cannot be seen here" if self.others is None else f"{self.others} at most"
        return "\n".join([*lines, f"Other processes on a device: {seen}"])

    def _arm(self, name: str) -> Arm:
        if name not in self.arms:
            raise ValueError(f"[Comparison] arm is {name!r}; expected one of {', '.join(self.arms)}")
        return self.arms[name]


def compare(
    arms: Mapping[str, Callable[[], object]],
    *,
    samples: int,
    seconds: float = 5.0,
    rounds: int = 5,
    devices: Sequence[Any] | None = None,
) -> Comparison:
    """Measure the energy per sample of variants of a step, alternately.

    First each arm is called for ``seconds`` unmeasured. Then each round has a window of each arm, in the
    opposite order of the round before (ABBA), so that a device that warms up favors none.

    Args:
        arms: name -> function without arguments, called again and again; at least two.
        samples: number of samples that one call processes.
        seconds: of each window, at least 2.
        rounds: number of windows of each arm, at least 3.
        devices: as of `window`.

    Returns: `Comparison`.
    Raises: as `window`, and what an arm raises.
    Warns: as `window`.
    Cost: (rounds + 1) * seconds for each arm, and 0.1 to 0.2 s per window.
    """
    if not isinstance(arms, Mapping) or not all(map(callable, arms.values())):
        raise TypeError(f"{WHERE} arms is {arms!r}; expected a dict of functions by name")
    if len(arms) < 2:
        checks.refuse(WHERE, "arms", arms, "at least two arms; energy.window measures one")
    samples = checks.count(WHERE, "samples", samples, "samples of one call of an arm", high=MOST_SAMPLES)
    rounds = checks.count(WHERE, "rounds", rounds, "windows of each arm", low=LEAST_ROUNDS)
    exact = checks.number(WHERE, "seconds", seconds)
    if not LEAST_SECONDS <= exact < math.inf:
        checks.refuse(WHERE, "seconds", seconds, f"a finite number >= {LEAST_SECONDS:g}")
    return measured(arms, counters_of(WHERE, devices), samples, exact, rounds)


def measured(
    arms: Mapping[str, Callable[[], object]],
    counters: Sequence[Counter],
    samples: int,
    seconds: float,
    rounds: int,
) -> Comparison:
    """`compare` with checked arguments, by these counters."""
    calls = {name: _run(arm, seconds, 1)[1] for name, arm in arms.items()}
    windows: dict[str, list[tuple[Window, int]]] = {name: [] for name in arms}
    for turn in range(rounds):
        for name in list(arms)[:: -1 if turn % 2 else 1]:
            with Window(counters, None, seconds) as window:
                done, calls[name] = _run(arms[name], seconds, calls[name])
            windows[name].append((window, samples * done))
    seen = [window.others for taken in windows.values() for window, _ in taken if window.others is not None]
    return Comparison(
        {name: _arm(taken) for name, taken in windows.items()},
        tuple(counter.name for counter in counters),
        max(seen, default=None),
    )


def _run(arm: Callable[[], object], seconds: float, calls: int) -> tuple[int, int]:
    """Call ``arm`` for ``seconds``, waiting for the device after each ``calls`` calls; returns how often it
    was called, and how many calls are better between two waits."""
    begin, done = time.monotonic(), 0
    while (start := time.monotonic()) - begin < seconds:
        for _ in range(calls):
            arm()
        synchronize(WHERE)
        done += calls
        if time.monotonic() - start < seconds / SLICES / 2:
            calls *= 2
    return done, calls


def _arm(windows: list[tuple[Window, int]]) -> Arm:
    devices = set.intersection(*(set(window.temperatures) for window, _ in windows))
    return Arm(
        tuple(window.joules / samples for window, samples in windows),
        tuple(window.seconds / samples for window, samples in windows),
        tuple(window.watts for window, _ in windows),
        {
            name: quartiles([window.temperatures[name] for window, _ in windows])[1]
            for name in sorted(devices)
        },
    )
