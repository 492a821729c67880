"""Paired samples of two callables in one process, and detection of disturbed samples."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

Call = Callable[[], None]
LOST_SHARE = 0.03  # share of a sample's wall time that other processes may take
LOST_SECONDS = 50e-6
POOL_REST = 5e-3  # seconds after which idle OpenMP threads stop spinning on cores that the stream needs
ENOUGH = 3  # minimum of clean pairs; with fewer, a measurement takes up to twice its budget


class Sample(NamedTuple):
    wall: float
    cpu: float  # of all threads of this process
    waited: float  # time that our threads waited for a core

    def disturbed(self, threads: int) -> bool:
        """Return whether other processes disturbed the sample. A single thread computes all the time, so any
        difference between wall and CPU time was lost. Several threads also wait for each other, so only time
        waiting for a core counts."""
        lost = max(self.waited, self.wall - self.cpu if threads == 1 else 0.0)
        return lost > LOST_SHARE * self.wall + LOST_SECONDS


class Triple(NamedTuple):
    ours: Sample
    theirs: Sample
    stream: Sample | None


@dataclass
class Timing:
    """All samples of one measurement: CPU time for one thread, wall time for several."""

    threads: int
    clean: list[Triple] = field(default_factory=list)
    dropped: int = 0
    other_load: float = 0.0  # cores that other processes kept busy

    @property
    def clock(self) -> str:
        return "cpu" if self.threads == 1 else "wall"

    def seconds(self, who: str, beside: str | None = None) -> np.ndarray:
        """Return the times of "ours", "theirs" or "stream"; only those paired with one of ``beside``."""
        triples = [t for t in self.clean if getattr(t, who) and getattr(t, beside or who)]
        return np.array([getattr(getattr(triple, who), self.clock) for triple in triples])

    def ratios(self) -> np.ndarray:
        """Return the speedups (their time / our time) of all pairs."""
        return self.seconds("theirs") / self.seconds("ours")

    def roof_ratios(self) -> np.ndarray:
        """Return the stream's time / our time of all pairs."""
        return self.seconds("stream") / self.seconds("ours", beside="stream")


@dataclass(frozen=True)
class Limits:
    samples: int  # number of clean pairs
    seconds: float  # approximate time of one measurement
    warm_up: int = 4  # ours builds its plan at the second step, and counts references at the fourth


class Budget:
    """Distributes the time of a full run over its measurements, so that it ends in time on busy machines."""

    def __init__(self, seconds: float, measurements: int, longest: float) -> None:
        self._end = time.perf_counter() + seconds
        self._left, self._longest = measurements, longest

    def share(self) -> float:
        """Return the seconds of the next measurement: half of its share, because a disturbed one may take
        twice as long."""
        share = max(0.0, self._end - time.perf_counter()) / max(1, self._left)
        self._left -= 1
        return min(self._longest, share / 2)


def percentile(values: np.ndarray, percent: float) -> float:
    """Return the percentile; NaN without values."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def alternate(
    ours: Call, theirs: Call, before: Call, stream: Call | None, threads: int, limits: Limits
) -> Timing:
    """Time ``ours`` and ``theirs`` alternately, each directly after ``before``; the order alternates too.

    ``stream``, where given, is timed once per pair. A pair with a disturbed sample is dropped and counted.
    """
    torch.set_num_threads(threads)
    for _ in range(limits.warm_up):
        for call in (before, ours, before, theirs, *([stream] if stream else [])):
            call()
    timing, taken = Timing(threads), {}
    collecting = gc.isenabled()
    gc.disable()
    try:
        begin, busy, cpu = time.perf_counter(), _busy_seconds(), time.process_time()
        for attempt in range(4 * limits.samples):
            for name, call in (("ours", ours), ("theirs", theirs))[:: -1 if attempt % 2 else 1]:
                before()
                taken[name] = _sample(call)
            if stream:
                time.sleep(POOL_REST)
            roof = _sample(stream) if stream else None
            if any(sample.disturbed(threads) for sample in taken.values()):
                timing.dropped += 1
            else:
                clean_roof = None if roof is None or roof.disturbed(threads) else roof
                timing.clean.append(Triple(taken["ours"], taken["theirs"], clean_roof))
            budget = limits.seconds * (1 if len(timing.clean) >= ENOUGH else 2)
            elapsed = time.perf_counter() - begin
            if len(timing.clean) >= limits.samples or elapsed > budget:
                break
        others = _busy_seconds() - busy - (time.process_time() - cpu)
        timing.other_load = max(0.0, others / (time.perf_counter() - begin))
    finally:
        if collecting:
            gc.enable()
    return timing


def _sample(call: Call) -> Sample:
    waited, cpu, wall = _waited_seconds(), time.process_time(), time.perf_counter()
    call()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return Sample(wall, cpu, _waited_seconds() - waited)


def _waited_seconds() -> float:
    """Return the time that our threads waited on run queues, from Linux; 0 on other systems."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel doesn't count
            continue
    return total * 1e-9


def _busy_seconds() -> float:
    """Return the CPU time of all processes on all cores; 0 without /proc."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _idle, _iowait, irq, soft_irq, steal = fields
    return (user + nice + system + irq + soft_irq + steal) / 100
