"""The calls of a step, made again with new gradients for as long as nothing but the gradients has changed.

Preparing a step costs microseconds per parameter, mostly to see that everything is as it was. Here the same
is seen by bulk comparisons of identities and addresses; those of the state are left out where nothing else
can have changed it. No state is kept alive: what is removed from the optimizer's state is freed at once.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor

from ... import _C
from ...ops.table import StepTable
from ...tensors.addresses import Fields
from .ownership import Watch, nothing_else_holds
from .slot import Mode, Slot

Group = dict[str, Any]
State = dict[Tensor, dict[str, Any]]
Columns = list[tuple[str, str | None]]


class Replay:
    """What the last step saw.

    Args:
        groups: the optimizer's.
        state: the optimizer's.
        modes: of each group, which states are in use.
        batches: each op call: its group, the name of the op, its slots and gradients.
    Raises: ValueError where a tensor is none that can be remembered.
    """

    def __init__(
        self,
        groups: list[Group],
        state: State,
        modes: list[Mode],
        batches: list[tuple[Group, str, list[Slot], Fields]],
    ) -> None:
        self._groups: list[Group] | None = list(groups)
        self._group_ids, self._modes = list(map(id, groups)), modes
        self._params: list[Tensor] | None = [param for group in groups for param in group["params"]]
        self._sizes = [len(group["params"]) for group in groups]
        places = {id(param): i for i, param in enumerate(self._params)}
        self._ids, self._state_ids = list(places), list(map(id, state))
        in_state = {key: i for i, key in enumerate(self._state_ids)}
        stepped = {id(slot.param) for _, _, slots, _ in batches for slot in slots}
        self._idle = [i for i, param in enumerate(self._params) if id(param) not in stepped]
        self._calls: list[tuple[int, StepTable]] = []  # each with the place of its group
        self._places: list[list[int]] = []  # of each call's parameters in the groups
        self._entries: list[tuple[list[int], Columns, list[int]]] = []  # of its states in the state
        for group, op, slots, grads in batches:
            states = [s for column in zip(*(slot.states for slot in slots), strict=True) for s in column]
            masters = [slot.master for slot in slots if slot.master is not None]
            params, steps = [slot.target for slot in slots], [slot.step for slot in slots]
            scales = [s for column in zip(*(slot.scales for slot in slots), strict=True) for s in column]
            seeds = [slot.seed for slot in slots]
            columns = slots[0].columns
            if any(slot.columns != columns for slot in slots):
                raise ValueError(f"[{op}] the parameters of a call keep different states; expected the same")
            table = StepTable(op, params, masters, states, steps, grads, scales, seeds)
            self._calls.append((self._group_ids.index(id(group)), table))
            self._places.append([places[id(slot.param)] for slot in slots])
            at = [in_state[id(slot.param)] for slot in slots]
            self._entries.append((at, columns, [len(slot.entry) for slot in slots]))
        written = [(table.param_fields, table.state_fields) for _, table in self._calls]
        self._written = _C.spans(list(chain.from_iterable(written)))
        self._apart: list[Fields] = []  # gradients that were seen to share no memory with what is written
        self._watch = Watch()

    def let_go(self) -> None:
        """Keep no parameter alive until the next step."""
        self._params = self._groups = None
        for _, table in self._calls:
            table.let_go()

    def calls(
        self,
        groups: list[Group],
        attributes: dict[str, Any],
        looks: int,
        mode_of: Callable[[Group], Mode],
    ) -> list[tuple[Group, StepTable, Fields]] | None:
        """The op calls of this step, or None where more than the gradients has changed.

        ``attributes`` are the optimizer's, with its state; ``looks`` says how often the optimizer's state
        was asked for.
        """
        if (
            not self._has_same_groups(groups)
            or [len(group["params"]) for group in groups] != self._sizes
            or not self._has_same_params(groups)
            or list(map(mode_of, groups)) != self._modes
        ):
            return None
        assert self._params is not None
        if any(self._params[i].grad is not None or hasattr(self._params[i], "main_grad") for i in self._idle):
            return None
        prepared = []
        for g, table in self._calls:
            if (grads := table.grads()) is None:
                return None
            prepared.append((groups[g], table, grads))
        if not self._are_apart([grads for _, _, grads in prepared]):
            return None
        if not self._watch.is_private(looks):
            if not self._has_same_state(attributes["state"]):
                return None
            if self._watch.asks_for_proof(looks):
                self._watch.proved(nothing_else_holds(attributes))
        return prepared

    def _has_same_groups(self, groups: list[Group]) -> bool:
        if self._groups is None and list(map(id, groups)) == self._group_ids:
            self._groups = list(groups)
        return self._groups is not None and _C.same_items([groups], self._groups)

    def _has_same_params(self, groups: list[Group]) -> bool:
        lists = [group["params"] for group in groups]
        if self._params is not None:
            return _C.same_items(lists, self._params)
        params = list(chain.from_iterable(lists))
        if list(map(id, params)) != self._ids:
            return False
        self._params = params
        for (_, table), places in zip(self._calls, self._places, strict=True):
            table.take([params[i] for i in places])
        return True

    def _are_apart(self, grads: list[Fields]) -> bool:
        """Whether no gradient lies in memory that a call writes: another call would read it changed."""
        if grads != self._apart:
            if any(_C.touches(fields, self._written) for fields in grads):
                return False
            self._apart = grads
        return True

    def _has_same_state(self, state: State) -> bool:
        """Whether the state has what it had, where it was."""
        if list(map(id, state)) != self._state_ids:
            return False
        entries = list(state.values())
        for (_, table), (places, columns, sizes) in zip(self._calls, self._entries, strict=True):
            tensors = _C.columns_of([entries[i] for i in places], columns, sizes)
            if tensors is None or not table.has_same_state(tensors):
                return False
        return True
