"""Steps of one parameter at a time, with the bits of a whole step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .batch import Group
from .optimizer import FusedOptimizer
from .slot import Slot


def overrides_step(kind: type[FusedOptimizer]) -> bool:
    """True if ``kind`` has a ``step`` of its own, which a step in parts would not call."""
    return getattr(kind.step, "__wrapped__", kind.step) is not FusedOptimizer._fusedamp_step


class Singles:
    """Steps the parameters of one optimizer one by one, each with the caches of its last step."""

    def __init__(self) -> None:
        self._places: dict[int, tuple[int, int]] = {}  # by id of the parameter: group, and index in it
        self._slots: dict[int, dict[int, Slot]] = {}

    def find(self, groups: list[Group], param: Tensor) -> tuple[int, int] | None:
        """Return the group of ``param`` and its index there; None if it is in none of ``groups``."""
        place = self._places.get(id(param))
        if place is None or not _is_at(groups, place, param):
            self._places = {
                id(p): (g, i) for g, group in enumerate(groups) for i, p in enumerate(group["params"])
            }
            place = self._places.get(id(param))
            self._slots = {}  # of parameters that left, too
        return place

    def step(self, optimizer: FusedOptimizer, param: Tensor, place: tuple[int, int]) -> None:
        """Step ``param`` as a step of all parameters would, if only it had a gradient."""
        g, i = place
        chosen: Any = vars(optimizer)
        before = optimizer._slots, optimizer._stepped
        optimizer._slots = self._slots.get(id(param), {})
        chosen["_chosen"] = lambda group, _: [(i, param)] if group == g else []
        chosen["_in_parts"] = iter  # no plan, which is for the same step twice in a row
        try:
            optimizer._step()
            self._slots[id(param)] = optimizer._slots
        finally:
            del chosen["_chosen"], chosen["_in_parts"]
            optimizer._slots, optimizer._stepped = before


def _is_at(groups: list[Group], place: tuple[int, int], param: Tensor) -> bool:
    g, i = place
    return g < len(groups) and i < len(groups[g]["params"]) and groups[g]["params"][i] is param
