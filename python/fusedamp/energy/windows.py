"""The energy of a block: a window from one tick of the counters to another."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self
from weakref import WeakSet

from ..ops import checks
from .counter import Counter, EnergyError, check_direction, next_ticks
from .devices import counters_of, synchronize

WHERE = "[energy.window]"
MOST_SAMPLES = 2**53

_open: WeakSet[Window] = WeakSet()
_lock = threading.Lock()


def window(
    samples: int | None = None, devices: Sequence[Any] | None = None, min_seconds: float = 2.0
) -> Window:
    """Measure the energy of a block: ``with energy.window(samples=n) as w: ...``, then ``w.joules``.

    Both ends wait for the GPUs that this process uses, and for the next tick of the counters, at most 0.3 s.
    So a window begins exactly at a tick and ends at most one tick (0.1 s) after the block. Nothing is
    subtracted: the energy is that of the whole device, with idle power and all that other threads and
    processes do there.

    Windows may be nested. Each is used once. A block that raises is not measured.

    Args:
        samples: number of samples in the block, for ``joules_per_sample``; may also be set in the block.
        devices: list of torch devices, their names or indices, or UUIDs of GPUs ("GPU-..."); or ["cpu"] for
            all CPU packages, without memory and mainboard. None: all GPUs that torch sees; one rank of
            several passes its own.
        min_seconds: shortest block that is measured. Ticks are about 0.1 s apart, so 2 s bound the
            error by 5 %.

    Returns: `Window`, a context manager.
    Raises: EnergyError if a device has no counter (MIG, vGPU, before Volta, no permission), or at the end of
        the block if it was too short or a counter stood still or ran back; ValueError, TypeError for
        arguments.
    Warns: if other processes use a GPU, or another thread has a window on it.
    Cost: a tick of the counter at both ends, 0.1 s; nothing within the block.
    Source: NVML's total energy consumption, Linux's RAPL.
    """
    seconds = checks.number(WHERE, "min_seconds", min_seconds)
    if not 0 <= seconds < math.inf:
        checks.refuse(WHERE, "min_seconds", min_seconds, "a finite number of seconds >= 0")
    return Window(counters_of(WHERE, devices), samples, seconds)


@dataclass(frozen=True)
class Result:
    """What a window measured; ``joules`` and ``temperatures`` by device."""

    joules: dict[str, float]
    seconds: float
    watts: float
    temperatures: dict[str, float]
    others: int | None


class Window:
    """Made by `window`. Its results can be read after the block; before, they raise `EnergyError`."""

    def __init__(self, counters: Sequence[Counter], samples: int | None, min_seconds: float) -> None:
        self.samples = samples
        self._counters, self._min_seconds = counters, min_seconds
        self._state = "was not entered yet"
        self._result: Result | None = None

    @property
    def joules(self) -> float:
        """Energy of all devices, in joules; never 0."""
        return sum(self._measured.joules.values())

    @property
    def seconds(self) -> float:
        """Time between the two ticks, in seconds; of several devices the longest."""
        return self._measured.seconds

    @property
    def watts(self) -> float:
        """Mean power of all devices together, in watts."""
        return self._measured.watts

    @property
    def joules_per_sample(self) -> float:
        """Joules divided by ``samples``."""
        measured = self.joules
        if self.samples is None:
            raise EnergyError(
                f"{WHERE} samples is None; expected the number of samples in the block. Pass samples=, or "
                "set it on the window"
            )
        return measured / self.samples

    @property
    def by_device(self) -> dict[str, float]:
        """Joules of each device: "cuda:0", a UUID, "package-0"."""
        return dict(self._measured.joules)

    @property
    def temperatures(self) -> dict[str, float]:
        """Degrees Celsius of each GPU that tells it, the mean of both ends."""
        return dict(self._measured.temperatures)

    @property
    def others(self) -> int | None:
        """Largest number of other processes on a GPU, at either end; None if they cannot be seen, as on a CPU
        and in some containers."""
        return self._measured.others

    @property
    def samples(self) -> int | None:
        """Number of samples in the block."""
        return self._samples

    @samples.setter
    def samples(self, value: int | None) -> None:
        what = "samples in the block"
        self._samples = (
            value if value is None else checks.count(WHERE, "samples", value, what, high=MOST_SAMPLES)
        )

    def __repr__(self) -> str:
        if self._result is None:
            return f"<energy.window that {self._state}>"
        names = ", ".join(self._result.joules)
        return f"<energy.window: {self.joules:.6g} J in {self.seconds:.6g} s, {self.watts:.4g} W ({names})>"

    @property
    def _measured(self) -> Result:
        if self._result is None:
            raise EnergyError(
                f"{WHERE} this window {self._state}; expected one whose block has ended. Read results after "
                "the block"
            )
        return self._result

    def __enter__(self) -> Self:
        if self._state != "was not entered yet":
            raise EnergyError(
                f"{WHERE} this window was entered before; expected a window for each block. Call "
                "energy.window again"
            )
        self._thread = threading.get_ident()
        with _lock:
            foreign = [other for other in _open if other._thread != self._thread]
            _open.add(self)
        try:
            self._others = self._count_others()
            self._warn_of_threads(foreign)
            self._warn_of_others(0)
            self._start()
        except BaseException:
            self._close()
            raise
        self._state, self._begin = "is still open", time.monotonic()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._state = "was not measured, as its block raised an error"
            if kind is None:
                self._state = "was not measured, as its end raised an error"
                before, self._result = self._others, self._end()
        finally:
            self._keeper.stop()
            self._close()
        if kind is None:
            self._warn_of_others(before or 0)

    def _start(self) -> None:
        synchronize(WHERE)
        for counter in self._counters:
            counter.start()
        self._first_celsius = self._celsius()
        self._first = next_ticks(self._counters)
        self._keeper = _Keeper(self._counters)

    def _close(self) -> None:
        with _lock:
            _open.discard(self)

    def _end(self) -> Result:
        synchronize(WHERE)
        took = time.monotonic() - self._begin
        if took < self._min_seconds:
            raise EnergyError(
                f"{WHERE} the block took {took:.3g} s; expected at least {self._min_seconds:g} s, as the "
                "counter ticks about every 0.1 s. Measure more of it, or pass a smaller min_seconds"
            )
        joules: dict[str, float] = {}
        seconds, watts = 0.0, 0.0
        for counter, first, last in zip(self._counters, self._first, next_ticks(self._counters), strict=True):
            check_direction(counter, first.joules, last.joules)
            joules[counter.name] = last.joules - first.joules
            watts += joules[counter.name] / (last.at - first.at)
            seconds = max(seconds, last.at - first.at)
        last_celsius = self._celsius()
        celsius = {n: (t + last_celsius[n]) / 2 for n, t in self._first_celsius.items() if n in last_celsius}
        self._others = max((n for n in (self._others, self._count_others()) if n is not None), default=None)
        return Result(joules, seconds, watts, celsius, self._others)

    def _celsius(self) -> dict[str, float]:
        read = {counter.name: counter.temperature() for counter in self._counters}
        return {name: celsius for name, celsius in read.items() if celsius is not None}

    def _count_others(self) -> int | None:
        """Return the largest number of other processes on a device; None if none of them tells."""
        return max((n for n in (c.others() for c in self._counters) if n is not None), default=None)

    def _warn_of_others(self, before: int) -> None:
        """Warn if there are more other processes than ``before``."""
        if self._others is not None and self._others > before:
            names = ", ".join(counter.name for counter in self._counters)
            warnings.warn(
                f"{WHERE} other processes use {names}, up to {self._others} on a GPU: their energy is "
                "included. Measure when they do not run",
                stacklevel=3,
            )

    def _warn_of_threads(self, foreign: list[Window]) -> None:
        mine = {counter.name for counter in self._counters}
        shared = sorted(mine & {counter.name for other in foreign for counter in other._counters})
        if shared:
            warnings.warn(
                f"{WHERE} another thread has a window on {', '.join(shared)}: both include the energy of "
                "what the other thread does. Measure in one thread",
                stacklevel=3,
            )


class _Keeper:
    """Reads counters that wrap around, in a thread of its own, until `stop`."""

    def __init__(self, counters: Sequence[Counter]) -> None:
        self._counters = [counter for counter in counters if counter.read_every < math.inf]
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="fusedamp.energy")
        if self._counters:
            self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(min(counter.read_every for counter in self._counters)):
            self.read()

    def read(self) -> None:
        for counter in self._counters:
            with suppress(EnergyError):  # the window's last read raises it, too
                counter.joules()

    def stop(self) -> None:
        self._stop.set()
