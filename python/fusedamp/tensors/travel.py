"""Remainders of split masters in a form that every collective moves.

gloo and NCCL have no int16. Bytes travel. Unlike 16-bit floats, they cannot be averaged or cast unnoticed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .shards import mapped


def as_bytes(bits: Tensor) -> Tensor:
    """View int16 ``bits`` as uint8 with one more dimension, of size 2; a DTensor stays one."""
    return mapped(bits, lambda shard: shard.unsqueeze(-1).view(torch.uint8), (*bits.shape, 2))


def holds_bytes(value: Tensor, shape: torch.Size) -> bool:
    """True if ``value`` can be :func:`as_bytes` of bits of ``shape``."""
    return value.dtype == torch.uint8 and value.shape == (*shape, 2)


def from_bytes(saved: Tensor) -> Tensor:
    """Undo :func:`as_bytes`; copies if the bytes of an element are apart or misaligned."""
    return mapped(saved, _joined, saved.shape[:-1])


def _joined(saved: Tensor) -> Tensor:
    if saved.storage_offset() % 2 or saved.stride(-1) != 1 or any(s % 2 for s in saved.stride()[:-1]):
        saved = saved.clone(memory_format=torch.contiguous_format)
    return saved.view(torch.int16).squeeze(-1)
