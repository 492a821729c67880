"""Times work on a device with CUDA events, after flushing caches; on the CPU with the host's clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

Call = Callable[[], object]
AHEAD_CYCLES = 40_000_000  # about 20 ms, in which the host queues all timed work


class Clock:
    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        size = 4 * torch.cuda.get_device_properties(0).L2_cache_size if self.cuda else 1 << 16
        self._flush = torch.empty(max(size, 1 << 16), dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def sample(self, call: Call, ahead: bool = False) -> float:
        """Return the milliseconds of one call. ``ahead``: the device waits until the host has queued all
        work, so that only device time counts; a call that syncs takes longer."""
        self._flush.zero_()
        self.wait()
        if not self.cuda:
            begin = time.perf_counter()
            call()
            return (time.perf_counter() - begin) * 1e3
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if ahead:
            torch.cuda._sleep(AHEAD_CYCLES)
        start.record()
        call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end)

    def alternate(self, calls: dict[str, Call], before: dict[str, Call], samples: int, ahead: bool) -> dict:
        """Time ``calls`` alternately, each after its ``before``; returns median, minimum and spread of
        each."""
        taken: dict[str, list[float]] = {name: [] for name in calls}
        for turn in range(samples + 2):
            for name, call in calls.items():
                before.get(name, lambda: None)()
                ms = self.sample(call, ahead)
                if turn >= 2:  # the first two are warm-up
                    taken[name].append(ms)
        return {name: summary(times) for name, times in taken.items()}


def summary(times: list[float]) -> dict[str, float]:
    ordered = sorted(times)
    return {
        "ms": median(times),
        "best_ms": ordered[0],
        "p80_ms": ordered[min(len(ordered) - 1, int(0.8 * len(ordered)))],
        "samples": len(times),
    }


def copy_speed(clock: Clock, device: str, size: int) -> float:
    """Return the GB/s of a device copy of ``size`` bytes, counting reads and writes."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    times = clock.alternate({"copy": lambda: target.copy_(source)}, {}, 10, ahead=True)
    return 2 * source.nbytes / times["copy"]["ms"] / 1e6
