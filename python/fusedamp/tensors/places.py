"""Where a shard's elements are in the whole tensor: random numbers belong to these places, so that results do
not depend on the number of ranks."""

from __future__ import annotations

from math import prod
from typing import Any, NamedTuple

from torch import Tensor

from .blocks import Index, part_of
from .shards import is_dtensor


class Place(NamedTuple):
    """Element i of the shard is element ``i // run * stride + first + i % run`` of the whole tensor, both in
    the order of memory; with ``run`` 0, ``first + i``."""

    first: int
    run: int
    stride: int


WHOLE = Place(0, 0, 0)


def place_of(param: Tensor, shard: Tensor) -> Place:
    """Return the place of ``shard``, the dense local tensor of ``param``.

    Raises: ValueError if the shard is not a range of rows, columns or both of the whole tensor.
    """
    if not is_dtensor(param) or shard.numel() == 0:
        return WHOLE
    strides = shard.stride()
    order = sorted(range(shard.dim()), key=lambda d: (-strides[d], d))
    whole, here = [param.size(d) for d in order], [shard.size(d) for d in order]
    starts = [_start(param, d, shard.size(d)) for d in order]
    cut = [i for i in range(len(order)) if here[i] != whole[i]]
    if not cut:
        return WHOLE
    innermost = cut[-1]
    outer = next((i for i in range(innermost) if here[i] > 1), innermost)
    if any(i not in (outer, innermost) for i in cut if here[i] > 1):
        raise ValueError(
            f"{_described(param)}; expected a range of rows and of columns on each rank, as random numbers "
            'belong to places in the whole tensor. Shard fewer dimensions, or use state_dtype="float32" with '
            "masters."
        )
    first = sum(start * prod(whole[i + 1 :]) for i, start in enumerate(starts))
    run, stride = prod(here[innermost:]), prod(whole[innermost:])
    return Place(first, 0, 0) if run == shard.numel() else Place(first, run, stride)


def _start(param: Tensor, dim: int, size: int) -> int:
    """Return where this rank's ``size`` indices of a dimension start."""
    mesh: Any = param.device_mesh  # type: ignore[attr-defined]
    index: Index = range(param.size(dim))
    for axis, placement in enumerate(param.placements):  # type: ignore[attr-defined]
        if getattr(placement, "dim", None) == dim:
            factor = getattr(placement, "split_factor", 1)
            index = part_of(index, factor, mesh.size(axis), mesh.get_local_rank(axis))
    if len(index) != size or tuple(index) != tuple(range(index[0], index[0] + size)):
        raise ValueError(
            f"{_described(param)}, of which this rank has {size} of dimension {dim}; expected indices "
            "without gaps, as random numbers belong to places in the whole tensor. Use sizes that the mesh "
            'divides, or state_dtype="float32" with masters.'
        )
    return index[0]


def _described(param: Any) -> str:
    return f"is a DTensor of shape {list(param.shape)} with placements {param.placements}"
