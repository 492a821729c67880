"""Watches the gradients and updates of an optimizer while it trains."""

from __future__ import annotations

import warnings
import weakref
from collections import deque
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..amp import routes
from ..amp.grad_scaler import GradScaler
from ..ops import checks
from ..ops.inputs import stepping_in_backward
from ..ops.observers import observe, observer_of, stop_observing
from ..optim.core.composed import ComposedOptimizer
from ..optim.core.optimizer import FusedOptimizer
from ..optim.core.parts import overrides_step
from . import loggers
from .activations import Activations
from .arrivals import assembled, names_of
from .record import Record
from .recorder import Recorder
from .rings import Fetch
from .torch_scaler import listen

_WHERE = "[numerics.watch]"


class Watch(Recorder):
    """What :func:`watch` returns: records of due steps, as they arrive, and the trajectory of all steps.

    Use it as a context manager, or call :meth:`remove`. It ends with the optimizer. It is not part of the
    optimizer's or scaler's ``state_dict``, pickles or copies.

    Attributes:
        dropped: how many records were overwritten before :meth:`poll` or a logger saw them.
    """

    def __init__(
        self, optimizer: Optimizer, number: int, every: int, history: int, updates: bool, model: Any
    ) -> None:
        super().__init__(optimizer, number, every, history, updates)
        self._model = model
        self._in_flight: deque[Fetch] = deque()
        self._rings: Fetch | None = None
        self._arrived: deque[Record] = deque()
        self._kept: deque[Record] = deque(maxlen=history)  # also those whose rings are gone
        self._newest = 0  # the last step that arrived
        self._loggers: list[Any] = []
        self._handles: list[Any] = []
        self.dropped = 0

    # What a user calls --------------------------------------------------------------------

    def poll(self) -> list[Record]:
        """Return the records that have arrived since the last call, oldest first. Never waits.

        On CUDA a due step's record is copied to the host behind the step's work. Of steps that were replayed
        by a CUDA graph, a call starts the copy, and a later call returns the records.
        """
        self._receive()
        found = list(self._arrived)
        self._arrived.clear()
        return found

    def collect(self) -> list[Record]:
        """Return all records that are still kept, at most ``history``, oldest first. Waits for the device."""
        found: dict[int, Record] = {}
        for fetch in (Fetch(self._all_rows()), *self._in_flight):
            fetch.wait()
            found |= {record.step: record for record in self._records_in(fetch)}
        found |= {record.step: record for record in self._kept}
        return [found[step] for step in sorted(found)][-self._history :]

    def trajectory(self) -> Tensor:
        """Return FP64 ``[m, 4]`` on the CPU: number, scale, whether it was skipped (0 or 1) and the largest
        magnitude of the scaled gradients of each of the last 4,096 steps. Waits for the device.

        The largest gradient is NaN where no gradients were read: without a scaler, in steps that are not due.
        """
        rows: dict[int, list[float]] = {}
        for clock in self._clocks.values():
            for number, scale, skipped, largest in clock.trajectory.tolist():
                old = rows.get(int(number), [number, scale, skipped, largest])
                rows[int(number)] = [number, scale, max(skipped, old[2]), max(largest, old[3])]
        kept = [rows[number] for number in sorted(rows) if number > 0]
        return torch.tensor(kept, dtype=torch.float64, device="cpu").reshape(-1, 4)

    def table(self, limit: int = 20) -> str:
        """Return a table of the records that are still kept, worst parameters first. Waits for the device.

        Args:
            limit: the number of parameters.
        """
        from .table import render

        return render(self.collect(), limit)

    def plot(self, path: str | Path, step: int | None = None) -> None:
        """Draw the records that are still kept into the file ``path``; waits. Needs matplotlib.

        Args:
            step: a recorded step: draw its parameters. Default: all steps.
        """
        from .chart import draw

        draw(self.collect(), self.trajectory(), path, step)

    def log_to(self, logger: Any) -> Watch:
        """Pass each record to ``logger`` as it arrives, at the end of a step or in :meth:`poll`.

        Args:
            logger: anything with ``log(step, values)``, such as those of :mod:`fusedamp.numerics.loggers`.
                One that raises is removed, with a warning: training goes on.
        """
        self._loggers.append(loggers.need_logger(logger))
        return self

    def remove(self) -> None:
        """Stop watching; further calls have no effect. Waits for records that are on their way."""
        for fetch in self._in_flight:
            fetch.wait()
        self._receive()
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if (optimizer := self._optimizer()) is not None:
            stop_observing(optimizer, self)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def __reduce__(self) -> Any:
        raise TypeError(
            "[Watch] cannot be pickled or copied; expected one watch per process. Make a new one."
        )

    def _attach(
        self, optimizer: Optimizer, scaler: Any, is_ours: bool, activations: nn.Module | None
    ) -> None:
        observe(optimizer, self)
        if scaler is not None and scaler.is_enabled() and not is_ours:
            self._handles.append(listen(scaler))
        # fusedamp's optimizers call these themselves. With fusedamp's scaler, a hook would make it wait.
        if not routes.is_fusedamps(optimizer) and not is_ours:
            me = weakref.ref(self)
            pre, post = Optimizer.register_step_pre_hook, Optimizer.register_step_post_hook
            self._handles.append(pre(optimizer, partial(_before, me)))
            self._handles.append(post(optimizer, partial(_after, me)))
        if activations is not None:
            self._activations = Activations(activations, self._clock_of, self._history)
            self._handles.append(self._activations)

    def end(self, found_inf: Tensor | None, scale: Tensor | None) -> None:
        super().end(found_inf, scale)
        if self._loggers:
            self._receive()

    def _recorded(self) -> None:
        if len(self._in_flight) >= self._history:
            self._in_flight.popleft()
            self.dropped += 1
        slot = self._number // self._every % self._history
        more = [] if self._activations is None else self._activations.rows()
        self._in_flight.append(Fetch([*self._now.values(), *more], slot))

    def _receive(self) -> None:
        while self._in_flight and self._in_flight[0].is_done():
            self._take(self._in_flight.popleft())
        if not self._is_captured:
            return
        if self._rings is not None and self._rings.is_done():
            self._take(self._rings)
            self._rings = None
        if self._rings is None:
            self._rings = Fetch(self._all_rows())
            if self._rings.is_done():
                self._take(self._rings)
                self._rings = None

    def _take(self, fetch: Fetch) -> None:
        for record in self._records_in(fetch):
            if record.step <= self._newest:
                continue
            if self._is_captured and self._newest:
                self.dropped += (record.step - self._newest) // self._every - 1
            self._newest = record.step
            self._kept.append(record)
            if len(self._arrived) >= self._history:
                self._arrived.popleft()
                self.dropped += not self._loggers
            self._arrived.append(record)
            self._log(record)

    def _records_in(self, fetch: Fetch) -> list[Record]:
        optimizer = self._optimizer()
        names = [] if optimizer is None else names_of(optimizer, self._model)
        return assembled(fetch, names)

    def _log(self, record: Record) -> None:
        for logger in list(self._loggers):
            try:
                loggers.send(logger, record)
            except Exception as error:  # whatever a third-party logger raises
                self._loggers.remove(logger)
                warnings.warn(
                    f"[Watch] {type(logger).__name__}.log raised {type(error).__name__}: {error}; expected "
                    "nothing. It gets no further records. Mend it, and call log_to again.",
                    stacklevel=2,
                )


def _before(me: weakref.ref[Watch], _: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if (watch := me()) is not None and not _has_closure(args, kwargs):
        watch.before_step()


def _after(me: weakref.ref[Watch], _: Optimizer, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
    if (watch := me()) is not None:
        if _has_closure(args, kwargs):
            watch.before_step()
        watch.after_step()


def _has_closure(args: Sequence[Any], kwargs: dict[str, Any]) -> bool:
    """Whether the gradients of a step come from a closure, after the step's pre-hooks."""
    return any(callable(value) for value in (*args, *kwargs.values()))


def watch(
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler | None = None,
    *,
    every: int = 50,
    history: int = 16,
    updates: bool = True,
    model: nn.Module | None = None,
    activations: nn.Module | None = None,
) -> Watch:
    """Watch the gradients of ``optimizer``, and the updates that it makes, in every ``every``-th step.

    The training loop stays as it is. Gradients are counted while they are checked for overflow, updates
    while they are made. Nothing waits for the device, and a CUDA graph may capture it. Values are those of
    this rank. An optimizer has one watch: a new one replaces it.

    Steps count from 1: the calls of fusedamp's ``scaler.step(optimizer)``, as in ``overflow_report()``;
    without it, the calls of ``optimizer.step()``, or of torch's ``scaler.step``. A step is due if its number
    is a multiple of ``every``. A due step that is skipped has a record without updates.

    Args:
        optimizer: any torch optimizer. Those of fusedamp also count updates, except Adafactor, Muon and
            Offloaded. A wrapper is replaced by its attribute ``optimizer``, as of Accelerate's and
            Lightning's.
        scaler: the scaler that steps it: fusedamp's, torch's, or None. It need not be enabled. Without
            torch's scaler here, a watch sees gradients that it has unscaled, and no skipped step.
        every: distance of due steps.
        history: how many records are kept, on the device and on the host.
        updates: whether to count updates; False costs less.
        model: names parameters. Default: the optimizer's ``param_names``, or positions.
        activations: a model whose leaf modules also count the gradients of their outputs, in rows such as
            "layer2 (activation)": one more read of each. They also bound the scale of
            ``GradScaler(policy="headroom")``.
    Returns: a :class:`Watch`, which need not be kept if a logger is set.
    Raises: TypeError or ValueError for a wrong argument, or an optimizer that steps in the backward pass or
        takes the scaler itself; then nothing is changed.
    Warns: if ``updates`` is True and the optimizer does not count them.
    Cost: on the device 568 bytes per parameter tensor and kept record. Time: see the page on numerics.
        Without a scaler, due steps read the gradients once more: before the step, or after it, if another
        optimizer than fusedamp's gets a closure.
    """
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{_WHERE} optimizer is {optimizer!r}; expected a torch.optim.Optimizer")
    while isinstance(inner := getattr(optimizer, "optimizer", None), Optimizer):
        optimizer = inner
    if scaler is not None and not isinstance(scaler, torch.amp.GradScaler):
        raise TypeError(
            f"{_WHERE} scaler is {scaler!r}; expected fusedamp's or torch's GradScaler, or None. Pass the "
            "scaler whose step calls this optimizer."
        )
    every = checks.count(_WHERE, "every", every, "the distance of steps that are recorded")
    history = checks.count(_WHERE, "history", history, "how many records are kept", high=2**16)
    updates = checks.flag(_WHERE, "updates", updates)
    for name, value in (("model", model), ("activations", activations)):
        if value is not None and not isinstance(value, nn.Module):
            raise TypeError(f"{_WHERE} {name} is {value!r}; expected a torch.nn.Module, or None")
    if optimizer in stepping_in_backward:
        raise ValueError(
            f"{_WHERE} the optimizer steps in the backward pass (step_in_backward); expected gradients that "
            "are still there in its step. Call remove() on step_in_backward's handle."
        )
    if routes.is_legacy(optimizer):
        raise ValueError(
            f"{_WHERE} {type(optimizer).__name__}.step takes the scaler itself; expected a step that a "
            "scaler calls with unscaled gradients. Remove the argument grad_scaler."
        )
    can_count = (
        isinstance(optimizer, FusedOptimizer)
        and not isinstance(optimizer, ComposedOptimizer)
        and not overrides_step(type(optimizer))
    )
    if updates and not can_count:
        warnings.warn(
            f"{_WHERE} {type(optimizer).__name__} does not count its updates; records have gradients only. "
            "Pass updates=False, or use an optimizer of fusedamp.optim such as AdamW.",
            stacklevel=2,
        )
    if isinstance(old := observer_of(optimizer), Watch):
        old.remove()
    is_ours = isinstance(scaler, GradScaler) and scaler.is_enabled()
    before = scaler._steps_of(optimizer) if isinstance(scaler, GradScaler) else 0
    made = Watch(optimizer, before + 1, every, history, updates and can_count, model)
    made._attach(optimizer, scaler, is_ours, activations)
    return made
