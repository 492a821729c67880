"""Detects references to an optimizer's state outside of the optimizer.

A step must not use a stale address, but comparing the addresses of thousands of state tensors is most of a
step's host time. State without other references cannot change. The optimizer counts accesses to its
``state``; once these stop, reference counts show whether other references to a part of it exist.
"""

from __future__ import annotations

from sys import getrefcount
from typing import Any
from weakref import getweakrefcount

import torch
from torch import Tensor

from ...tensors.addresses import HAS_GIL
from ..state.encoded import Encoded, Quantized, Scales


def _counts(held: list[Any]) -> set[int]:
    return set(map(getrefcount, held))


_ONLY_THE_LIST = _counts([object()]).pop()  # references by the list and by the counting itself
_uses_of_storage = getattr(torch._C, "_storage_Use_Count", None)
# Without both counts, other references cannot be ruled out, and each step compares the state.
_CAN_TELL = HAS_GIL and _uses_of_storage is not None and hasattr(Tensor, "_use_count")


def _beyond_python(tensor: Tensor) -> tuple[int, ...]:
    """Count references that getrefcount excludes: weak ones, those in C++, and other views of the storage."""
    held = getweakrefcount(tensor), tensor._use_count()  # type: ignore[attr-defined]
    if isinstance(tensor, Encoded):  # it has no memory
        return held
    storage = tensor.untyped_storage()
    return *held, _uses_of_storage(storage._cdata), getrefcount(storage)  # type: ignore[misc]


def no_other_references(attributes: dict[str, Any]) -> bool:
    """True if every object's reference count equals the expected count: one for the state (its attribute),
    each entry (the state) and each tensor (its entry, or the encoded tensor that contains it), and none
    outside of Python.
    """
    if not _CAN_TELL:
        return False
    state = [attributes["state"]]
    entries = list(attributes["state"].values())
    tensors = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    inner = [value.bits for value in tensors if isinstance(value, Encoded) and not isinstance(value, Scales)]
    scales = [
        value.scales for value in tensors if isinstance(value, Quantized)
    ]  # also referenced by the entry
    held = ((state, 1), (entries, 1), (tensors, 1), (inner, 1), (scales, 2))
    if any(_counts(objects) - {_ONLY_THE_LIST + known} for objects, known in held):
        return False
    fresh = _beyond_python(torch.empty(1, device="cpu"))
    return {_beyond_python(tensor) for tensor in (*tensors, *inner, *scales)} <= {fresh, fresh[:2]}


class Watch:
    """Decides when the state must be compared again.

    ``accesses`` is the number of accesses to the optimizer's state.
    """

    def __init__(self) -> None:
        self._accesses = -1
        self._quiet, self._patience = 0, 1  # comparisons since the last access; number until the next count
        self._is_private = False

    def is_private(self, accesses: int) -> bool:
        """True if the state cannot have changed since the last comparison."""
        return self._is_private and accesses == self._accesses

    def should_count_references(self, accesses: int) -> bool:
        """Record a comparison of the state; returns whether to count references now."""
        if accesses != self._accesses:
            self._accesses, self._quiet, self._patience, self._is_private = accesses, 0, 1, False
            return False
        self._quiet += 1
        if self._quiet < self._patience:
            return False
        self._patience *= 2  # while other references exist, counts become exponentially rarer
        return True

    def set_private(self, is_private: bool) -> None:
        self._is_private = is_private
