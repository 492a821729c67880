"""Records the steps of one optimizer in the rings of a watch: what scalers and optimizers call."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..amp import routes
from ..amp.flags import combine
from ..amp.gradients import Gradients
from ..amp.overflow import params_of
from ..ops import Numerics
from ..ops.inputs import flag_on
from ..ops.observers import Tally
from .activations import Activations
from .rings import Clock, Rows

_MAX_SETS = 16  # of parameters with gradients; bounds memory if the set changes at every step


class Recorder:
    """An observer of ``optimizer`` (:class:`fusedamp.ops.observers.Observer`): counts every step, and the
    gradients and updates of due ones. It never waits for the device.

    Args:
        number: of the next step.
        every, history, updates: of :func:`fusedamp.numerics.watch`.
    """

    def __init__(self, optimizer: Optimizer, number: int, every: int, history: int, updates: bool) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._every, self._history, self._counts_updates = every, history, updates
        self._number = number  # of the current step, as the host knows it
        self._clocks: dict[torch.device, Clock] = {}
        self._sets: dict[tuple[torch.device, Sequence[int]], Rows] = {}
        self._now: dict[torch.device, Rows] = {}  # with gradients of the current step
        self._is_open = False  # whether the current step has begun
        self._in_scaler = False  # whether a scaler's step has begun, which ends it
        self._ends_with_step = False  # whether the optimizer's step ends it, not a scaler
        self._only_due = False  # whether gradients are read in due steps only
        self._given: tuple[Tensor | None, Tensor | None] = (None, None)  # overflow flag and scale
        self._is_captured = False  # whether a CUDA graph has captured a step, and may replay it
        self._activations: Activations | None = None

    def _recorded(self) -> None:
        """The current step, which is due, is in the rings."""
        raise NotImplementedError

    def begin(self) -> None:
        self._is_open = self._in_scaler = True

    def abort(self) -> None:
        self._in_scaler = False

    def numerics(self, device: torch.device, positions: Sequence[int]) -> Numerics:
        self._is_open, self._only_due, self._ends_with_step = True, False, False
        self._now[device] = rows = self._rows_of(device, positions)
        return rows.numerics

    def checked(self, device: torch.device, squares: Callable[[], Tensor]) -> None:
        self._now[device].squares = squares()

    def activations(self, device: torch.device) -> Tensor | None:
        return None if self._activations is None else self._activations.largest(device)

    def tally(self, device: torch.device, positions: Sequence[int]) -> Tally | None:
        rows = self._now.get(device)
        if rows is None or not self._counts_updates:
            return None
        return Tally(rows.part(positions), rows.clock.due)

    def end(self, found_inf: Tensor | None, scale: Tensor | None) -> None:
        if not self._is_open:
            return
        self._record(found_inf, scale, advance=True)
        self._is_captured |= (captures := self._captures())
        if self._number % self._every == 0 and self._now and not captures:
            self._recorded()
        self._number += not captures
        self._now.clear()
        self._is_open = self._in_scaler = self._ends_with_step = self._only_due = False

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def before_step(self) -> None:
        is_scalers = self._in_scaler or self._ends_with_step
        if is_scalers and self._now and not self._only_due:  # a scaler has read them
            return
        optimizer = self._optimizer()
        if optimizer is None:
            return
        self._now.clear()  # of a step that was not made, or was made without the scaler
        self._is_open, self._given = True, (None, None)
        self._read_unscaled(optimizer)
        self._ends_with_step = not self._in_scaler

    def after_step(self) -> None:
        optimizer = self._optimizer()
        if not self._ends_with_step or optimizer is None:
            return
        found_inf, scale = self._given
        if (by_hand := routes.by_hand(optimizer)[0]) is not None and self._clocks:
            flags = [flag_on(next(iter(self._clocks)), by_hand), *([] if found_inf is None else [found_inf])]
            found_inf = combine(flags, flags[0].device)
        self.end(found_inf, scale)

    # What torch's scaler does, as torch_scaler.py hears it ---------------------------------

    def read_scaled(self, inv_scale: Tensor, scale: Tensor) -> None:
        """Read gradients before a scaler unscales them; the optimizer's step, or the next call, ends this."""
        optimizer = self._optimizer()
        if optimizer is None:
            return
        if self._is_open:  # the last step was skipped by a scaler that did not tell
            self._skip_on()
        Gradients(params_of(optimizer)).stats(inv_scale, reader=self)
        self._is_open = self._ends_with_step = True
        self._given = (None, scale.clone())

    def found(self, found_inf: Tensor) -> None:
        self._given = (found_inf.clone(), self._given[1])
        self._record(*self._given, advance=False)

    def _read_unscaled(self, optimizer: Optimizer) -> None:
        """Read gradients that no scaler has seen: in due steps only, as nothing else needs them."""
        is_due = self._number % self._every == 0 or self._is_captured
        if self._clocks and not is_due and not self._captures():
            self._only_due = True
            return
        gradients = Gradients(params_of(optimizer))
        devices = [device for device, bucket in gradients.by_device.items() if bucket.tensors]
        for device in devices:
            self._clock_of(device)
        if is_due or self._captures():
            gradients.stats(None, reader=self, only_due=True)
        self._only_due = bool(devices)

    def _captures(self) -> bool:
        """True if a CUDA graph is being captured."""
        on_cuda = any(device.type == "cuda" for device in self._clocks)
        return on_cuda and torch.cuda.is_current_stream_capturing()

    def _clock_of(self, device: torch.device) -> Clock:
        if device not in self._clocks:
            other = next(iter(self._clocks.values()), None)
            self._clocks[device] = Clock(device, self._number, self._every, other)
        return self._clocks[device]

    def _rows_of(self, device: torch.device, positions: Sequence[int]) -> Rows:
        key = (device, positions if isinstance(positions, range) else tuple(positions))
        if key not in self._sets:
            while len(self._sets) >= _MAX_SETS:
                del self._sets[next(iter(self._sets))]
            self._sets[key] = Rows(key[1], self._clock_of(device), self._history)
        return self._sets[key]

    def _all_rows(self) -> Sequence[Rows]:
        more = [] if self._activations is None else self._activations.rows()
        return [*self._sets.values(), *more]

    def _record(self, found_inf: Tensor | None, scale: Tensor | None, advance: bool) -> None:
        if self._activations is not None:
            self._activations.record(self._every, scale, found_inf)
        if self._only_due:
            scale = None  # gradients were unscaled before
        for device in self._clocks:
            rows = self._now.get(device) or self._rows_of(device, ())
            rows.record(self._every, scale, found_inf, only_due=self._only_due, advance=advance)

    def _skip_on(self) -> None:
        """Go to the next step; this one is recorded."""
        if self._number % self._every == 0:
            self._recorded()
        self._now.clear()
        for device in self._clocks:
            self._rows_of(device, ()).record(self._every, None, None, is_main=False)
        self._number += 1
