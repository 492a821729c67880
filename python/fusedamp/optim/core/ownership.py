"""Whether anybody but the optimizer can reach what its ``state`` holds.

A step must not use an address that somebody has changed, but looking at thousands of state tensors to see
that nobody has is most of what a step costs the host. What nobody else can reach, nobody else can change: the
optimizer counts how often it was asked for its ``state``, and once nobody asks any more, reference counts
tell whether somebody kept a part of it.
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


_ONLY_THE_LIST = _counts([object()]).pop()  # what the list and the counting itself add up to
_uses_of_storage = getattr(torch._C, "_storage_Use_Count", None)
# Without these two nobody can be ruled out, and the state is compared in each step.
_CAN_TELL = HAS_GIL and _uses_of_storage is not None and hasattr(Tensor, "_use_count")


def _beyond_python(tensor: Tensor) -> tuple[int, ...]:
    """References that Python's counts don't show: weak ones, those in C++, and other views of the memory."""
    held = getweakrefcount(tensor), tensor._use_count()  # type: ignore[attr-defined]
    if isinstance(tensor, Encoded):  # it has no memory
        return held
    storage = tensor.untyped_storage()
    return *held, _uses_of_storage(storage._cdata), getrefcount(storage)  # type: ignore[misc]


def no_other_references(attributes: dict[str, Any]) -> bool:
    """Whether all references to the optimizer's state are known: of the state, its attribute; of each entry,
    the state; of each tensor, its entry, or the encoded one that it is in; and nothing beyond Python.
    """
    if not _CAN_TELL:
        return False
    state = [attributes["state"]]
    entries = list(attributes["state"].values())
    tensors = [value for entry in entries for value in entry.values() if isinstance(value, Tensor)]
    inner = [value.bits for value in tensors if isinstance(value, Encoded) and not isinstance(value, Scales)]
    scales = [
        value.scales for value in tensors if isinstance(value, Quantized)
    ]  # an entry names them as well
    held = ((state, 1), (entries, 1), (tensors, 1), (inner, 1), (scales, 2))
    if any(_counts(objects) - {_ONLY_THE_LIST + known} for objects, known in held):
        return False
    fresh = _beyond_python(torch.empty(1, device="cpu"))
    return {_beyond_python(tensor) for tensor in (*tensors, *inner, *scales)} <= {fresh, fresh[:2]}


class Watch:
    """When a state that was compared must be compared again.

    ``accesses`` says how often anybody was given the optimizer's state.
    """

    def __init__(self) -> None:
        self._accesses = -1
        self._quiet, self._patience = 0, 1  # comparisons since the last look; after how many to count again
        self._is_private = False

    def is_private(self, accesses: int) -> bool:
        """Whether nobody can have changed the state since it was compared last."""
        return self._is_private and accesses == self._accesses

    def should_count_references(self, accesses: int) -> bool:
        """Told that the state was just compared: whether to find out now if anybody holds a part of it."""
        if accesses != self._accesses:
            self._accesses, self._quiet, self._patience, self._is_private = accesses, 0, 1, False
            return False
        self._quiet += 1
        if self._quiet < self._patience:
            return False
        self._patience *= 2  # somebody who holds on to it costs a count at ever longer intervals
        return True

    def set_private(self, is_private: bool) -> None:
        self._is_private = is_private
