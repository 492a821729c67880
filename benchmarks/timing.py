"""Paired samples of two callables in one process, and the judgement which samples were disturbed."""

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
LOST_SHARE = 0.03  # of a sample's wall time that may be lost to other work
LOST_SECONDS = 50e-6
POOL_REST = 5e-3  # seconds after which idle OpenMP threads no longer spin on the cores that the stream needs
ENOUGH = 3  # clean pairs without which a measurement goes on for twice its budget


class Sample(NamedTuple):
    wall: float
    cpu: float  # of all threads of this process
    waited: float  # time that our threads were ready to run while a core did something else

    def disturbed(self, threads: int) -> bool:
        """One thread computes all the time, so CPU time short of wall time was lost. More threads also wait
        for each other, so there only time spent waiting for a core counts."""
        lost = max(self.waited, self.wall - self.cpu if threads == 1 else 0.0)
        return lost > LOST_SHARE * self.wall + LOST_SECONDS


class Triple(NamedTuple):
    ours: Sample
    theirs: Sample
    stream: Sample | None


@dataclass
class Timing:
    """All samples of one measurement. On one thread the judge is CPU time, on more it is wall time."""

    threads: int
    clean: list[Triple] = field(default_factory=list)
    dropped: int = 0
    other_load: float = 0.0  # cores that other work kept busy meanwhile

    @property
    def clock(self) -> str:
        return "cpu" if self.threads == 1 else "wall"

    def seconds(self, who: str, beside: str | None = None) -> np.ndarray:
        """The times of "ours", "theirs" or "stream"; only those that have one ``beside`` them."""
        triples = [t for t in self.clean if getattr(t, who) and getattr(t, beside or who)]
        return np.array([getattr(getattr(triple, who), self.clock) for triple in triples])

    def ratios(self) -> np.ndarray:
        """Their time / our time, pair by pair: above 1, ours is faster."""
        return self.seconds("theirs") / self.seconds("ours")

    def roof_ratios(self) -> np.ndarray:
        """The stream's time / our time, pair by pair."""
        return self.seconds("stream") / self.seconds("ours", beside="stream")


@dataclass(frozen=True)
class Limits:
    samples: int  # clean pairs wanted
    seconds: float  # about how long one measurement may take
    warm_up: int = 4  # ours reads addresses in its second step, and proves in its fourth whose the state is


class Budget:
    """Shares the time of a whole run out to its measurements, so that it ends in time on busy machines."""

    def __init__(self, seconds: float, measurements: int, longest: float) -> None:
        self._end = time.perf_counter() + seconds
        self._left, self._longest = measurements, longest

    def share(self) -> float:
        """Seconds for the next measurement: half of its share, for a disturbed one may take twice as long."""
        share = max(0.0, self._end - time.perf_counter()) / max(1, self._left)
        self._left -= 1
        return min(self._longest, share / 2)


def percentile(values: np.ndarray, percent: float) -> float:
    """NaN where there is nothing."""
    return float(np.percentile(values, percent)) if len(values) else float("nan")


def alternate(
    ours: Call, theirs: Call, before: Call, stream: Call | None, threads: int, limits: Limits
) -> Timing:
    """Time ``ours`` and ``theirs`` in turns, each right after ``before``; who goes first alternates.

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
    """What Linux says that our threads waited on run queues; 0 on other systems."""
    total = 0
    for task in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(task.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended, or the kernel doesn't count
            continue
    return total * 1e-9


def _busy_seconds() -> float:
    """CPU time of everybody on this machine, all cores; 0 where there is no /proc."""
    try:
        fields = [int(text) for text in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
    except (OSError, ValueError):
        return 0.0
    user, nice, system, _idle, _iowait, irq, soft_irq, steal = fields
    return (user + nice + system + irq + soft_irq + steal) / 100
