"""Records which parameters overflowed in which step, on the device; read on request only."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..ops import GradStats
from ..ops.inputs import StepLog
from .flags import lasting, on
from .gradients import Gradients, Stamp

_MAX_RECORDS = (
    16  # distinct sets of parameters with gradients; bounds memory if the set changes at every step
)


@dataclass(frozen=True, slots=True)
class Overflow:
    """The non-finite gradient elements of one parameter in one step, on this rank."""

    parameter: str
    shape: tuple[int, ...]
    inf: int
    nan: int
    unscaled: int  # finite before, but not after division by the scale


@dataclass(frozen=True, slots=True)
class OverflowReport:
    """The latest skipped step of one optimizer; falsy if none is known.

    ``step`` counts the calls of ``scaler.step(optimizer)`` from 1; it is 0 if no overflow was recorded.
    """

    step: int = 0
    overflows: tuple[Overflow, ...] = ()

    def __bool__(self) -> bool:
        return self.step > 0

    def __str__(self) -> str:
        if not self:
            return "no overflow recorded"
        lines = [f"step {self.step} was skipped:"]
        for o in self.overflows:
            what = [f"{n} {kind}" for n, kind in ((o.inf, "inf"), (o.nan, "NaN")) if n]
            if o.unscaled:
                what.append(f"{o.unscaled} too large once unscaled")
            lines.append(f"  {o.parameter} {list(o.shape)}: {', '.join(what)}")
        if not self.overflows:
            lines.append("  by no gradient that still exists on this rank")
        return "\n".join(lines)


@dataclass(slots=True)
class _Record:
    """Element counts of the latest overflow in one set of gradients, updated in place (for CUDA graphs)."""

    counts: Tensor
    step: Tensor


class OverflowLog:
    """The overflows of one optimizer. Only :meth:`report` syncs the host."""

    def __init__(self, optimizer: Optimizer, device: torch.device) -> None:
        self._optimizer = weakref.ref(optimizer)
        with lasting():
            self._steps = torch.zeros((), dtype=torch.int64, device=device)
        self._records: dict[tuple[torch.device, Sequence[int]], _Record] = {}
        self._last: tuple[Sequence[int], _Record] | None = None  # the record of the last step
        self._uncounted: tuple[Stamp, Tensor, Tensor] | None = None

    def next_step(self) -> None:
        self._steps.add_(1)

    def count(self) -> int:
        """Return the number of steps; syncs the host."""
        return int(self._steps)

    def record(self, gradients: Gradients, stats: dict[torch.device, GradStats], found_inf: Tensor) -> None:
        """Store the counts of a gradient check if this step is an overflow (decided on the device)."""
        for device, stat in stats.items():
            self._record(gradients.by_device[device].positions, stat.counts, found_inf, self._steps)

    def record_uncounted(self, gradients: Gradients, found_inf: Tensor) -> None:
        """Record a step whose gradients were unscaled before; :meth:`report` counts their elements."""
        self._uncounted = (Stamp(gradients.originals, weak=True), found_inf.clone(), self._steps.clone())
        self._record(
            (), torch.zeros(0, 3, dtype=torch.int64, device=found_inf.device), found_inf, self._steps
        )

    def _record(self, positions: Sequence[int], counts: Tensor, found_inf: Tensor, step: Tensor) -> None:
        record = self._record_of(positions, counts)
        overflow = on(found_inf, counts.device) != 0
        torch.where(overflow, counts, record.counts, out=record.counts)
        torch.where(overflow, on(step, counts.device), record.step, out=record.step)

    def record_counts(self, positions: Sequence[int], counts: Tensor, found_inf: Tensor) -> None:
        """Store ``counts`` if this step is an overflow."""
        self._record(positions, counts, found_inf, self._steps)

    def of_step(self, positions: Sequence[int], counts: Tensor) -> StepLog:
        """Return the log that a step op on the same device updates itself: :meth:`next_step` and
        :meth:`record_counts` in one."""
        if self._last is None or self._last[0] is not positions:
            self._last = (positions, self._record_of(positions, counts))
        record = self._last[1]
        return StepLog(counts, record.counts, record.step, self._steps)

    def _record_of(self, positions: Sequence[int], counts: Tensor) -> _Record:
        """Return the record of one set of gradients."""
        key = (counts.device, positions if isinstance(positions, range) else tuple(positions))
        if key not in self._records:
            while len(self._records) >= _MAX_RECORDS:
                del self._records[next(iter(self._records))]
            with lasting():
                never = torch.zeros((), dtype=torch.int64, device=counts.device)
                self._records[key] = _Record(torch.zeros_like(counts), never)
                self._last = None  # it may have been dropped
        return self._records[key]

    def report(self) -> OverflowReport:
        """Read all records; syncs the host."""
        optimizer = self._optimizer()
        if optimizer is not None and self._uncounted is not None:
            stamp, found_inf, step = self._uncounted
            gradients = Gradients(params_of(optimizer))
            if stamp.matches(gradients.originals):
                for device, stat in gradients.stats(None).items():
                    self._record(gradients.by_device[device].positions, stat.counts, found_inf, step)
        params = [] if optimizer is None else list(named(optimizer))
        steps = {key: int(record.step) for key, record in self._records.items()}
        latest = max(steps.values(), default=0)
        overflows = [
            Overflow(*params[position], *row)
            for (device, positions), record in self._records.items()
            if latest and steps[device, positions] == latest
            for position, row in zip(positions, record.counts.tolist(), strict=True)
            if any(row) and position < len(params)
        ]
        return OverflowReport(latest, tuple(overflows))


def params_of(optimizer: Optimizer) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def named(optimizer: Optimizer) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each parameter; unnamed ones are named by their position in
    ``param_groups``."""
    for g, group in enumerate(optimizer.param_groups):
        names = group.get("param_names", ())
        for i, param in enumerate(group["params"]):
            name = names[i] if i < len(names) else f"{type(optimizer).__name__} group {g} parameter {i}"
            yield name, tuple(param.shape)
