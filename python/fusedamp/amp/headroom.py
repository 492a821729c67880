"""The policy "headroom" of a loss scale: its state, and the largest gradients that it follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import checks
from ..ops.observers import Observer, Reader
from .flags import PerDevice, lasting

_HEAD, _COUNTS, _RING = 8, 64, 512  # csrc/math/headroom.h
_OVERFLOW = 2.0**16  # what FP16 cannot hold
_LEAST = -40  # exponent of the first count


class Headroom:
    """The rule of :func:`fusedamp.ops.update_scale_headroom_` and its state. Pickles and copies hold the
    state as :meth:`save` returns it.

    Args:
        bits: how many bits the largest gradients stay below FP16's largest number.
    """

    LARGEST_BACKOFF = 2.0**-4

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self._saved: list[int] = []
        self._state: Tensor | None = None

    def place(self, device: torch.device | str) -> Tensor:
        """Return the state; the first call makes it on ``device``."""
        if self._state is None:
            with lasting():
                self._state = torch.zeros(ops.HEADROOM_STATE, dtype=torch.int32, device=device)
                if self._saved:
                    self._state.copy_(_unpacked(self._saved))
        return self._state

    def update(self, scale: Tensor, found_inf: Tensor, largest: Tensor, **rule: Any) -> None:
        state = self.place(scale.device)
        ops.update_scale_headroom_(scale, state, found_inf, largest, headroom_bits=self.bits, **rule)

    def save(self) -> list[int]:
        """Return the state as few plain numbers: overflows in a row, good steps in a row, those that waited
        to grow, patience, and the exponents that are kept, oldest first. Syncs the host."""
        if self._state is None:
            return list(self._saved) or [0] * 4
        numbers: list[int] = self._state.tolist()
        kept, cursor = numbers[4:6]
        ring = numbers[_HEAD + _COUNTS :]
        order = ring[cursor:] + ring[:cursor] if kept == _RING else ring[:kept]
        return numbers[:4] + [place + _LEAST for place in order]

    def load(self, saved: Sequence[int]) -> None:
        """Set the state to what :meth:`save` returned; empty: a new one."""
        self._saved = list(saved)
        if self._state is not None:
            self._state.copy_(_unpacked(self._saved))

    def __getstate__(self) -> dict[str, Any]:
        return {"bits": self.bits, "_saved": self.save(), "_state": None}


def _unpacked(saved: list[int]) -> Tensor:
    """Return the int32 state on the CPU."""
    head, ring = saved[:4] or [0] * 4, [exponent - _LEAST for exponent in saved[4:]]
    counts = [ring.count(place) for place in range(_COUNTS)]
    free = [0] * (_RING - len(ring))
    state = [*head, len(ring), len(ring) % _RING, 0, 0, *counts, *ring, *free]
    return torch.tensor(state, dtype=torch.int32, device="cpu")


def checked_saved(saved: Any) -> list[int]:
    """Return ``saved`` if it is what :meth:`Headroom.save` returns.

    Raises: ValueError naming the number that is wrong.
    """
    where = "[GradScaler] state_dict['_headroom']"
    if not isinstance(saved, (list, tuple)) or not (len(saved) == 0 or 4 <= len(saved) <= 4 + _RING):
        what = f"{len(saved)} numbers" if isinstance(saved, (list, tuple)) else f"a {type(saved).__name__}"
        raise ValueError(
            f"{where} is {what}; expected a list of 4 to {4 + _RING} whole numbers, or none. Delete the "
            "entry to start from scratch."
        )
    most = checks.INT32_MAX  # counts must not overflow at the next good step
    limits = [(0, 3), (0, most - 1), (0, most - 1), (0, most)] + [(_LEAST, _LEAST + _COUNTS - 1)] * _RING
    for i, (number, (low, high)) in enumerate(zip(saved, limits, strict=False)):
        if not isinstance(number, int) or isinstance(number, bool) or not low <= number <= high:
            raise ValueError(
                f"{where}[{i}] is {number!r}; expected a whole number from {low} to {high}. Delete the entry "
                "to start from scratch."
            )
    return list(saved)


class LargestGradient(Reader):
    """The largest |gradient| of one optimizer, as stored, of the latest check of its gradients.

    A watch of the optimizer reads in the same checks.
    """

    def __init__(self) -> None:
        self.watch: Observer | None = None
        self._buffers: dict[torch.device, ops.Numerics] = {}
        self._extremes: PerDevice = {}

    def numerics(self, device: torch.device, positions: Sequence[int]) -> ops.Numerics:
        if self.watch is not None:
            found = self.watch.numerics(device, positions)
        else:
            found = self._own(device, len(positions))
        self._extremes[device] = found.extremes
        return found

    def _own(self, device: torch.device, n: int) -> ops.Numerics:
        if device not in self._buffers or len(self._buffers[device].extremes) != n:
            with lasting():
                self._buffers[device] = ops.Numerics(
                    torch.empty(n, 3, dtype=torch.float64, device=device),
                    torch.empty(n, 64, dtype=torch.int64, device=device),  # never written
                    torch.zeros((), dtype=torch.int32, device=device),
                )
        return self._buffers[device]

    def checked(self, device: torch.device, squares: Callable[[], Tensor]) -> None:
        if self.watch is not None:
            self.watch.checked(device, squares)

    def take(self, alone: bool) -> PerDevice:
        """Return the largest gradient on each device, FP64, 0-d, with that of activations, if a watch counts
        them; no sync.

        Raises: RuntimeError if other ranks may have other activations, and ``alone`` says that they are not
            asked.
        """
        found = {device: extremes.select(1, 0).amax() for device, extremes in self._extremes.items()}
        self._extremes.clear()
        watch, self.watch = self.watch, None  # until the next check
        for device in list(found)[:1]:
            activations = None if watch is None else watch.activations(device)
            if activations is not None and alone:
                raise RuntimeError(
                    '[GradScaler] policy="headroom" and a watch of activations, which differ over ranks; '
                    "expected a process_group, without which each rank would have its own scale. Pass it to "
                    "GradScaler, or watch without activations."
                )
            if (
                activations is not None
            ):  # those that overflowed, with finite weights' gradients, bring it down
                found[device] = torch.maximum(found[device], activations.nan_to_num(posinf=_OVERFLOW))
        return found
