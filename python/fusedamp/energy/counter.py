"""What energy counters have in common, and how to wait for their next tick."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import NamedTuple

LONGEST_TICK = 0.3  # seconds. GPUs tick about every 100 ms, some every 20 ms; CPUs every millisecond.
POLL = 0.001  # seconds between two reads


class EnergyError(RuntimeError):
    """Energy cannot be measured: there is no counter, it fails, or the window is too short for it."""


class Reading(NamedTuple):
    """What a counter showed, in joules, and when, in seconds of `time.monotonic`."""

    joules: float
    at: float


class Counter:
    """The energy counter of one device; ``name`` as in "cuda:0", a UUID or "package-0"."""

    name: str
    read_every = math.inf  # seconds until it must be read again, as it wraps around

    def start(self) -> None:
        """Prepare for reads: earlier ones do not matter."""

    def joules(self) -> float:
        """Read the counter: joules since some time in the past."""
        raise NotImplementedError

    def temperature(self) -> float | None:
        """Read the temperature in degrees Celsius; None if the device does not tell."""
        return None

    def others(self) -> int | None:
        """Count the other processes that use the device; None if they are not listed."""
        return None


def next_ticks(counters: Sequence[Counter]) -> list[Reading]:
    """Wait until each counter has moved, at most 0.3 s; returns the last move of each.

    Raises: EnergyError if a counter stands still or runs back.
    """
    last = [counter.joules() for counter in counters]
    moves: list[Reading | None] = [None] * len(counters)
    deadline = time.monotonic() + LONGEST_TICK
    while time.monotonic() < deadline:
        time.sleep(POLL)
        for i, counter in enumerate(counters):
            value, now = counter.joules(), time.monotonic()
            check_direction(counter, last[i], value)
            if value > last[i]:
                last[i], moves[i] = value, Reading(value, now)
        done = [move for move in moves if move is not None]
        if len(done) == len(counters):
            return done
    still = ", ".join(counter.name for counter, move in zip(counters, moves, strict=True) if move is None)
    raise EnergyError(
        f"[energy] the energy counter of {still} stood still for {LONGEST_TICK} s; expected a tick about "
        "every 0.1 s. This device does not count its energy here: measure on another one"
    )


def check_direction(counter: Counter, before: float, after: float) -> None:
    """Raise `EnergyError` if the counter ran back."""
    if after < before:
        raise EnergyError(
            f"[energy] the energy counter of {counter.name} ran back from {before:.3f} to {after:.3f} J; "
            "expected it to grow. The driver was loaded again or the device was reset: measure again"
        )
