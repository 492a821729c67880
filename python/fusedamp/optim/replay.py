"""The calls of a step, made again with new gradients for as long as nothing but the gradients has changed.

Preparing a step costs microseconds per parameter, mostly to see that everything is as it was. Here the same
is seen by bulk comparisons of identities and addresses; those of the state are left out where nobody else can
have changed it.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Any

from torch import Tensor

from .._C import same_items, same_values
from ..packed import Fields, StepTable
from .ownership import Watch, nobody_else_holds
from .slot import Mode, Slot

Group = dict[str, Any]
State = dict[Tensor, dict[str, Any]]


class Replay:
    """What the last step saw.

    Args:
        groups: the optimizer's.
        attributes: the optimizer's, with its ``state``.
        modes: of each group, which states are in use.
        batches: each op call: its group, the name of the op, its slots and gradients.
    Raises: ValueError where a tensor is none that can be remembered.
    """

    def __init__(
        self,
        groups: list[Group],
        attributes: dict[str, Any],
        modes: list[Mode],
        batches: list[tuple[Group, str, list[Slot], Fields]],
    ) -> None:
        state: State = attributes["state"]
        self._groups, self._state, self._modes = list(groups), [state], modes
        self._params = [param for group in groups for param in group["params"]]
        self._sizes = [len(group["params"]) for group in groups]
        self._entries = list(state.values())
        self._values = list(chain.from_iterable(map(dict.values, self._entries)))
        stepped = {id(slot.param) for _, _, slots, _ in batches for slot in slots}
        self._idle = [param for param in self._params if id(param) not in stepped]
        self._calls = []
        for group, op, slots, grads in batches:
            states = [s for column in zip(*(slot.states for slot in slots), strict=True) for s in column]
            masters = [slot.master for slot in slots if slot.master is not None]
            params, steps = [slot.target for slot in slots], [slot.step for slot in slots]
            scales = [s for column in zip(*(slot.scales for slot in slots), strict=True) for s in column]
            seeds = [slot.seed for slot in slots]
            table = StepTable(op, params, masters, states, steps, grads, scales, seeds)
            self._calls.append((group, table))
        self._watch = Watch()

    def calls(
        self,
        groups: list[Group],
        attributes: dict[str, Any],
        looks: int,
        mode_of: Callable[[Group], Mode],
    ) -> list[tuple[Group, StepTable, Fields]] | None:
        """The op calls of this step, or None where more than the gradients has changed.

        ``looks`` says how often anybody was given the optimizer's state.
        """
        if (
            not same_items([groups], self._groups)
            or [len(group["params"]) for group in groups] != self._sizes
            or not same_items([group["params"] for group in groups], self._params)
            or list(map(mode_of, groups)) != self._modes
            or any(param.grad is not None or hasattr(param, "main_grad") for param in self._idle)
        ):
            return None
        prepared = []
        for group, table in self._calls:
            if (grads := table.grads()) is None:
                return None
            prepared.append((group, table, grads))
        if not self._watch.is_private(looks):
            if not self._has_same_state(attributes):
                return None
            if self._watch.asks_for_proof(looks):
                self._watch.proved(self._is_state_private())
        return prepared

    def _has_same_state(self, attributes: dict[str, Any]) -> bool:
        return (
            attributes["state"] is self._state[0]
            and same_items([list(self._state[0].values())], self._entries)
            and same_values(self._entries, self._values)
            and all(table.has_same_state() for _, table in self._calls)
        )

    def _is_state_private(self) -> bool:
        """Who else holds them: of the state, the optimizer; of the entries, the state and their slots; of the
        tensors, their entries, slots (twice), ``_values`` and tables.
        """
        tensors = [tensor for _, table in self._calls for tensor in table.state]
        return nobody_else_holds((self._state, 1), (self._entries, 2), (tensors, 5), tensors=tensors)
