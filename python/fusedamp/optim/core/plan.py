"""Cached op calls of a step, repeated with new gradients while nothing else changes.

Preparing a step costs microseconds per parameter, mostly to check that nothing changed. A plan checks this in
one C++ pass. It compares the addresses of states only if other code may have changed them. It keeps no state
alive: tensors removed from the optimizer's state are freed.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

from torch import Tensor

from ... import _C
from ...ops.inputs import GradientTable, inputs_on
from ...ops.observers import observer_of
from ...ops.table import StepTable, rule_of
from ...tensors.addresses import can_read, holds_float64
from ..state.formats import name_dtypes
from .batch import Batch, Group
from .ownership import Watch, no_other_references
from .slot import Mode, Slot

Columns = list[tuple[str, str | None]]


class Plan:
    """Snapshot of the last step.

    Args:
        optimizer: a FusedOptimizer; no reference is kept.
        batches: its op calls.
    Raises: ValueError if a tensor is not supported.
    """

    def __init__(self, optimizer: Any, batches: list[Batch]) -> None:
        groups, state = optimizer.param_groups, vars(optimizer)["state"]
        if not isinstance(groups, list):
            raise ValueError(f"param_groups is a {type(groups).__name__}; expected a list")
        self._modes = [_mode_of(optimizer, group) for group in groups]
        places = {id(param): i for i, param in enumerate(p for group in groups for p in group["params"])}
        self._state_ids = list(map(id, state))
        in_state = {key: i for i, key in enumerate(self._state_ids)}
        by_device: dict[Any, list[Batch]] = {}
        for batch in batches:
            by_device.setdefault(batch.slots[0].source.device, []).append(batch)
        self._tables: list[tuple[StepTable, Sequence[int]]] = []  # with its rows' positions in the groups
        self._calls: list[list[tuple[int, int]]] = [[] for _ in groups]  # per group: table, and call in it
        self._entries: list[tuple[int, int, list[int], Columns, list[int]]] = []
        columns, kinds = [0] * len(places), [(0, 0)] * len(places)
        for some in by_device.values():
            calls = sorted(((batch.call(), batch) for batch in some), key=lambda pair: rule_of(pair[0]))
            table = StepTable([call for call, _ in calls])
            slots = [slot for _, batch in calls for slot in batch.slots]
            positions = [places[id(slot.param)] for slot in slots]
            _, numels, dtypes = table.fields.tolist()
            for row, place in enumerate(positions):
                columns[place], kinds[place] = table.column_address(row), (numels[row], dtypes[row])
            for c, (_, batch) in enumerate(calls):
                self._calls[_index_of(batch.group, groups)].append((len(self._tables), c))
                at = [in_state[id(slot.param)] for slot in batch.slots]
                sizes = [len(slot.entry) for slot in batch.slots]
                self._entries.append((len(self._tables), c, at, _columns_of(batch.slots), sizes))
            in_order = range(len(positions))  # which compares quickly
            self._tables.append((table, in_order if positions == list(in_order) else tuple(positions)))
        rates = [[self._tables[t][0].rate_address(c) for t, c in calls] for calls in self._calls]
        self._walk = _C.Plan(groups, columns, kinds, rates)
        self._written = _C.spans(list(chain.from_iterable(table.written() for table, _ in self._tables)))
        self._watch = Watch()
        self.gradients = self._only_gradients()

    def let_go(self) -> None:
        """Drop references to parameters until the next step."""
        for table, _ in self._tables:
            table.let_go()

    def matches(self, optimizer: Any, versioned: bool = False) -> bool:
        """Check that only gradients and options changed, and copy new options into the tables.

        ``versioned``: also record the version counters of the gradients, for a scaler.
        Raises: ValueError if a new option is invalid.
        """
        groups = optimizer.param_groups
        if not can_read() or not isinstance(groups, list):
            return False
        changed = self._walk.look(groups, versioned)
        return changed is not None and all(self._takes_options(optimizer, g, groups[g]) for g in changed)

    def _takes_options(self, optimizer: Any, g: int, group: Group) -> bool:
        name_dtypes(group)
        optimizer._check_group(optimizer._where(g), group)
        if _mode_of(optimizer, group) != self._modes[g]:
            return False
        for t, c in self._calls[g]:
            table = self._tables[t][0]
            table.set_numbers(c, optimizer._numbers(group, table.device))
        self._walk.note_options(g, group)
        return True

    def is_ready(self, optimizer: Any) -> bool:
        """True if the tables can make the step; call after a successful :meth:`matches`."""
        if self._walk.gradients_moved() and any(
            _C.touches(table.grads, self._written) for table, _ in self._tables
        ):
            return False  # a gradient aliases memory that a call writes before another call reads it
        accesses = optimizer._accesses
        if not self._watch.is_private(accesses):
            if not self._has_same_state(vars(optimizer)["state"]):
                return False
            if self._watch.should_count_references(accesses):
                self._watch.set_private(no_other_references(vars(optimizer)))
        return True

    def step(self, optimizer: Any) -> None:
        """Make the op calls, after all checks."""
        ready, observer = [], observer_of(optimizer)
        for table, positions in self._tables:
            if not table.params:
                params = [param for group in optimizer.param_groups for param in group["params"]]
                table.params = [params[i] for i in positions]
            tally = None if observer is None else observer.tally(table.device, positions)
            ready.append((table, inputs_on(optimizer, table.device), tally))
        for table, inputs, tally in ready:
            table.step(table.params, inputs, *(tally or ()))
            if inputs.log is not None:
                optimizer._amp.logged = True

    def _has_same_state(self, state: dict[Tensor, dict[str, Any]]) -> bool:
        """True if the state has the same entries at the same addresses."""
        if list(map(id, state)) != self._state_ids:
            return False
        entries = list(state.values())
        for t, c, places, columns, sizes in self._entries:
            tensors = _C.columns_of([entries[i] for i in places], columns, sizes)
            if tensors is None or not self._tables[t][0].has_same_states(c, tensors):
                return False
        return True

    def _only_gradients(self) -> GradientTable | None:
        """Return the table of all gradients if they are on one device, else None."""
        if len(self._tables) != 1:
            return None
        table, positions = self._tables[0]
        return GradientTable(
            table.fields,
            holds_float64(table.grads),
            table.device,
            positions,
            self._walk.mark,
            self._walk.is_as_marked,
        )


def _mode_of(optimizer: Any, group: Group) -> tuple[Mode, bool]:
    """Return what determines the rows of a group's parameters."""
    return optimizer._mode(group), group["maximize"]


def _index_of(group: Group, groups: list[Group]) -> int:
    return next(g for g, other in enumerate(groups) if other is group)


def _columns_of(slots: list[Slot]) -> Columns:
    columns = slots[0].columns
    if any(slot.columns != columns for slot in slots):
        raise ValueError("the parameters of a call have different states; expected the same")
    return columns
