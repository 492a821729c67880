"""The sides of a comparison on a device: those of contenders.py, on tensors created there."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fusedamp.optim.state.formats import Storage
from torch import Tensor

from ..contenders import DTYPES, INIT_SCALE, PLAIN, Contender, Fusedamp, torch_side
from ..duel import NO_CLIPPING
from ..rows import Row
from ..workloads import Shapes


@dataclass
class Side:
    """``phase()`` is timed; ``restore()`` restores the gradients, as a backward pass would."""

    contender: Contender
    restore: Callable[[], None]

    def phase(self) -> None:
        self.contender.phase()

    @property
    def weights(self) -> list[Tensor]:
        return [weight.detach() for weight in self.contender.weights]


def gradients(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype) for shape in shapes]


def _starts(shapes: Shapes, dtype: torch.dtype, device: str) -> list[Tensor]:
    return [torch.randn(shape, device=device, dtype=dtype).mul_(0.05) for shape in shapes]


def ours(
    shapes: Shapes,
    dtype: torch.dtype,
    device: str,
    grads: list[Tensor] | None = None,
    optimizer: str = "adamw",
    storage: Storage = PLAIN,
) -> Side:
    """Return fusedamp's side, which does not modify gradients: nothing to restore."""
    grads = gradients(shapes, dtype, device) if grads is None else grads
    weights = _starts(shapes, dtype, device)
    return Side(Fusedamp(optimizer, weights, grads, NO_CLIPPING, storage), lambda: None)


def theirs(row: Row, shapes: Shapes, device: str, grads: list[Tensor]) -> Side:
    """Return torch's side, which unscales FP32 gradients in place by a power of two; by hand it uses
    copies."""
    weights = _starts(shapes, DTYPES[row.dtype], device)
    contender = torch_side(row.rival, row.optimizer, weights, grads, NO_CLIPPING)
    if row.rival.by_hand:
        return Side(contender, lambda: None)
    return Side(contender, lambda: torch._foreach_mul_(grads, INIT_SCALE))
