"""What a watch keeps on one device: the number of the step, and rings of what due steps counted."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..amp.flags import lasting, on
from ..ops import Numerics
from ..ops.numerics import record

TRAJECTORY = 4096  # steps
_BINS, _EXTREMES, _UPDATES, _NUMBERS = 64, 3, 4, 6  # csrc/engine/record.h
_NONE: frozenset[int] = frozenset()


class Clock:
    """The current step on one device: its number, from 1, and whether it is due; and scale and largest
    gradient of the latest steps."""

    def __init__(self, device: torch.device, number: int, every: int, like: Clock | None = None) -> None:
        """``like``: that of another device, which may know better (replays of a CUDA graph)."""
        with lasting():
            if like is None:
                # [number, 0], made on the device.
                self.now = torch.arange(number, -1, -number, dtype=torch.int64, device=device)
                self.due = torch.full((), int(number % every == 0), dtype=torch.int32, device=device)
            else:
                self.now, self.due = on(like.now, device).clone(), on(like.due, device).clone()
            self.trajectory = torch.zeros(TRAJECTORY, 4, dtype=torch.float64, device=device)


class Rows:
    """Counters of some tensors on one device, one row each, and their rings.

    Args:
        positions: of the tensors, in the order of the rows: a range or a tuple, which compare quickly.
        clock: of the device.
        history: slots of the rings.
        names: by position, of tensors that are not the optimizer's parameters.
    """

    def __init__(
        self, positions: Sequence[int], clock: Clock, history: int, names: Sequence[str] = ()
    ) -> None:
        self.names = names
        n, device = len(positions), clock.now.device
        self.positions, self.clock = positions, clock
        self._row_of = {position: row for row, position in enumerate(self.positions)}
        with lasting():
            self.numerics = Numerics(
                torch.zeros(n, _EXTREMES, dtype=torch.float64, device=device),
                torch.zeros(n, _BINS, dtype=torch.int64, device=device),
                clock.due,
            )
            self.squares = torch.zeros(n, dtype=torch.float64, device=device)
            self.updates = torch.zeros(n, _UPDATES, dtype=torch.float64, device=device)
            self.rings = (
                torch.zeros(history, 4, dtype=torch.float64, device=device),
                torch.zeros(history, n, _NUMBERS, dtype=torch.float64, device=device),
                torch.zeros(history, n, _BINS, dtype=torch.int64, device=device),
            )
        # Of the current step, which may be tried again after an error: updates by rows, rows with updates.
        self._parts: dict[tuple[int, ...], Tensor] = {}
        self._counted: frozenset[int] = _NONE
        self._everything = frozenset(range(n))

    def part(self, positions: Sequence[int]) -> Tensor:
        """Return where a step op counts the updates of ``positions``; :meth:`record` collects them."""
        if self.positions == positions:
            self._parts, self._counted = {}, self._everything
            return self.updates
        rows = tuple(self._row_of.get(position, -1) for position in positions)
        self._counted |= {*rows} - {-1}
        if rows and rows == tuple(range(rows[0], rows[0] + len(rows))) and rows[0] >= 0:
            return self.updates.narrow(0, rows[0], len(rows))
        part = torch.empty(len(rows), _UPDATES, dtype=torch.float64, device=self.updates.device)
        self._parts[rows] = part
        return part

    def record(
        self,
        every: int,
        scale: Tensor | None,
        found_inf: Tensor | None,
        is_main: bool = True,
        only_due: bool = False,
        advance: bool = True,
    ) -> None:
        """Write the current step into the rings, and with ``advance`` go to the next; no sync.

        ``is_main``: whether these are the optimizer's gradients, of which the trajectory is.
        """
        for rows, part in self._parts.items():
            pairs = [
                (self.updates.select(0, row), part.select(0, i)) for i, row in enumerate(rows) if row >= 0
            ]
            if pairs:
                torch._foreach_copy_([to for to, _ in pairs], [source for _, source in pairs])
        has_updates = bool(self.positions) and self._counted == self._everything
        device, clock = self.updates.device, self.clock
        record(
            (clock.now, clock.due),
            self.rings,
            clock.trajectory if is_main else None,
            self.numerics,
            self.squares,
            every=every,
            updates=self.updates if has_updates else None,
            scale=None if scale is None else on(scale, device),
            found_inf=None if found_inf is None else on(found_inf, device),
            only_due=only_due,
            advance=advance,
        )
        if advance:
            self._parts, self._counted = {}, _NONE

    def forget(self) -> None:
        """Start to count from 0, where several tensors are added up in a row."""
        for tensor in (self.numerics.extremes, self.numerics.histogram, self.squares):
            tensor.zero_()


class Fetch:
    """A copy of a slot of all rings, or of all slots, on its way to the host; of several sets of rows."""

    def __init__(self, rows: Sequence[Rows], slot: int | None = None) -> None:
        slots = slice(None) if slot is None else slice(slot, slot + 1)
        self.rows = tuple(rows)
        self.tensors = [[_to_host(ring[slots]) for ring in part.rings] for part in rows]
        self._events: list[torch.cuda.Event] = []
        for device in {part.updates.device for part in rows if part.updates.is_cuda}:
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record(torch.cuda.current_stream(device))
            self._events.append(event)

    def is_done(self) -> bool:
        return all(event.query() for event in self._events)  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        for event in self._events:
            event.synchronize()


def _to_host(tensor: Tensor) -> Tensor:
    """Start a copy; on the CPU it is made at once."""
    with lasting():
        if not tensor.is_cuda:
            return tensor.clone()
        host = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
        return host.copy_(tensor, non_blocking=True)
