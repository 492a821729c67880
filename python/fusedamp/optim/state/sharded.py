"""8-bit states of sharded DTensors: a DTensor of FP32 whose local part is encoded.

A shard has blocks of its own. If shards begin and end with blocks of the whole tensor, as in a matrix whose
rows are whole blocks, values and scales are those of the whole tensor. Then checkpoints hold both as
DTensors, which can be placed elsewhere without a change. Otherwise a boundary between shards cuts a block,
both ranks have a scale for their part, and checkpoints hold FP32 values.
"""

from __future__ import annotations

from math import prod
from typing import Any

import torch
from torch import Tensor

from ...ops.recode import SCALE_BLOCK
from ...tensors.layout import placed_like
from ...tensors.shards import is_dtensor, local, mapped, placed_with
from .encoded import Quantized


def is_quantized(value: object) -> bool:
    """True for an 8-bit state, also of a DTensor."""
    return isinstance(value, Tensor) and isinstance(local(value), Quantized)


def like(shard: Quantized, param: Tensor) -> Tensor:
    """Return ``shard`` as a state of ``param``: itself, or the DTensor whose local part it is."""
    return placed_with(shard, param) if is_dtensor(param) else shard


def dequantized(value: Tensor) -> Tensor:
    """Return the FP32 values of an 8-bit state, with its placements."""
    return mapped(value, lambda shard: shard.dequantize(), value.shape)


def apart(value: Tensor) -> tuple[Tensor, Tensor] | None:
    """Return the values and the block scales of a DTensor's 8-bit state as DTensors; None if a boundary
    cuts a block."""
    shape = _scales_shape(value)
    if shape is None:
        return None
    shard = local(value)
    assert isinstance(shard, Quantized)
    more = _more_dims(value, shape)
    bits, scales = shard.bits, shard.scales.view(_cut(shape, shard.shape) + more)
    return mapped(value, lambda _: bits, value.shape), mapped(value, lambda _: scales, shape + more)


def together(codes: Tensor, scales: Tensor, param: Tensor) -> Tensor:
    """Return an 8-bit state from saved values and scales, sharded like ``param`` or unsharded.

    DTensors that are placed otherwise than ``param`` are gathered; collective.
    """
    kept = [(t.device_mesh, t.placements) for t in (codes, scales, param) if is_dtensor(t)]  # type: ignore[attr-defined]
    if len(kept) == 3 and kept[0] == kept[1] == kept[2] and scales.shape == _saved_shape(param):
        return like(Quantized(local(codes), local(scales).reshape(-1)), param)
    codes, scales = (t.full_tensor() if is_dtensor(t) else t for t in (codes, scales))  # type: ignore[attr-defined]
    return Quantized(
        codes, scales.reshape(-1) if scales.numel() == -(-codes.numel() // SCALE_BLOCK) else scales
    )


def cut(whole: Quantized, param: Tensor) -> Tensor | None:
    """Return the part of an unsharded state that belongs to this rank of the DTensor ``param``; None if a
    boundary cuts a block."""
    shape = _saved_shape(param)
    if shape is None or not whole.bits.is_contiguous():
        return None
    codes, scales = local(placed_like(whole.bits, param)), local(placed_like(whole.scales.view(shape), param))
    return like(Quantized(codes.contiguous(), scales.reshape(-1)), param)


def _scales_shape(tensor: Any) -> tuple[int, ...] | None:
    """Return the shape of all block scales as one tensor with the placements of ``tensor``; None if there is
    none, as a boundary between shards cuts a block."""
    shape = tuple(tensor.shape)
    parts: dict[int, int] = {}
    for size, placement in zip(tensor.device_mesh.shape, tensor.placements, strict=True):
        if size > 1 and hasattr(placement, "dim"):
            parts[placement.dim] = parts.get(placement.dim, 1) * size
    if not parts:
        return (-(-prod(shape) // SCALE_BLOCK),)
    if not local(tensor).is_contiguous():
        return None
    last = max(parts)  # boundaries in outer dimensions are boundaries of whole indices of this one
    size, inside = shape[last], prod(shape[last + 1 :])
    if inside % SCALE_BLOCK == 0 and inside:
        return (*shape[: last + 1], inside // SCALE_BLOCK)
    if size % parts[last] == 0 and size // parts[last] * inside % SCALE_BLOCK == 0:
        return (*shape[:last], size * inside // SCALE_BLOCK)
    return None


def _more_dims(tensor: Any, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return dimensions of size 1 to append to the ``shape`` of block scales, so that they have each one that
    ``tensor`` shards: also over a single rank, which cuts no block."""
    dims = 1 + max((p.dim for p in tensor.placements if hasattr(p, "dim")), default=0)
    return (1,) * (dims - len(shape))


def _saved_shape(tensor: Any) -> tuple[int, ...] | None:
    shape = _scales_shape(tensor)
    return None if shape is None else shape + _more_dims(tensor, shape)


def _cut(whole: tuple[int, ...], shard: torch.Size) -> tuple[int, ...]:
    """Return the shape of a shard's scales: those of its elements, in the dimensions of ``whole``."""
    outer = tuple(shard[: len(whole) - 1])
    return (*outer, -(-prod(shard[len(whole) - 1 :]) // SCALE_BLOCK))
