"""Where the shards of a DTensor are in the whole tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate, chain, pairwise, product
from typing import Any

import torch
from torch import Tensor

from .shards import MeshDim, layout_of, local

Place = tuple[int, ...]  # a rank's coordinates along some mesh dimensions
Runs = tuple[tuple[int, int], ...]  # of consecutive indices: the first, and the one after the last
Index = range | tuple[int, ...]


def split_over(tensor: Tensor, axis: int | None = None) -> tuple[MeshDim, ...]:
    """Return the mesh dimensions of several ranks that split ``tensor``, or only its dimension ``axis``.

    Empty for a tensor that each rank has whole, and on ranks outside of the mesh.
    """
    return tuple(
        (mesh, dim)
        for mesh, dim in layout_of(tensor).sharded
        if mesh.size(dim) > 1
        and mesh.get_coordinate() is not None
        and (axis is None or tensor.placements[dim].dim == axis % tensor.dim())  # type: ignore[attr-defined]
    )


def reduced_like(axis: int, tensor: Any) -> Tensor:
    """Return an uninitialized tensor for sums of ``tensor`` along ``axis``, which keeps one element.

    Of a DTensor it is replicated over the mesh dimensions that split ``axis``, and placed alike over others.
    """
    shard = local(tensor)
    shape, whole = list(shard.shape), list(tensor.shape)
    shape[axis] = whole[axis] = 1
    reduced = shard.new_empty(shape)
    if shard is tensor:
        return reduced
    from torch.distributed.tensor import DTensor, Replicate

    split = {dim for _, dim in layout_of(tensor).sharded if tensor.placements[dim].dim == axis % tensor.dim()}
    placements = [Replicate() if dim in split else p for dim, p in enumerate(tensor.placements)]
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(
        reduced, tensor.device_mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride
    )


@dataclass(frozen=True)
class Block:
    """A matrix that the ranks along some mesh dimensions hold together.

    Args:
        shape: of the matrix.
        parts: the rows and columns of each rank's shard; the coordinate along the first dimension varies
            fastest.
        mine: this rank.
    """

    shape: tuple[int, int]
    parts: dict[Place, tuple[Runs, Runs]]
    mine: Place

    def shape_at(self, place: Place) -> tuple[int, int]:
        """Return the shape of the shard at ``place``."""
        rows, columns = (sum(stop - start for start, stop in runs) for runs in self.parts[place])
        return rows, columns

    def joined(self, shards: Sequence[Tensor]) -> Tensor:
        """Return the matrix of ``shards``, flat tensors in the order of ``parts``."""
        pieces = [shard.view(self.shape_at(place)) for place, shard in zip(self.parts, shards, strict=True)]
        if self._is_cut_by_rows:
            return torch.cat(pieces)
        whole = pieces[0].new_empty(self.shape)
        for place, piece in zip(self.parts, pieces, strict=True):
            for inside, part in self._pairs(place, whole, piece):
                inside.copy_(part)
        return whole

    def cut(self, whole: Tensor) -> list[Tensor]:
        """Return the shards of ``whole``: the reverse of :meth:`joined`."""
        if self._is_cut_by_rows:
            pieces = torch.split(whole, [self.shape_at(place)[0] for place in self.parts])
            return [piece.reshape(-1) for piece in pieces]
        shards = [whole.new_empty(self.shape_at(place)) for place in self.parts]
        for place, shard in zip(self.parts, shards, strict=True):
            for inside, part in self._pairs(place, whole, shard):
                part.copy_(inside)
        return [shard.view(-1) for shard in shards]

    @cached_property
    def _is_cut_by_rows(self) -> bool:
        """True if the shards are consecutive rows: one copy joins them."""
        runs = [run for rows, _ in self.parts.values() for run in rows]
        is_in_order = all(before[1] == after[0] for before, after in pairwise(runs))
        return is_in_order and all(columns == ((0, self.shape[1]),) for _, columns in self.parts.values())

    def _pairs(self, place: Place, whole: Tensor, shard: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the parts of ``whole`` and of the shard at ``place`` that are the same."""
        rows, columns = map(_with_starts, self.parts[place])
        for (top, bottom, row), (left, right, column) in product(rows, columns):
            part = shard[row : row + bottom - top, column : column + right - left]
            yield whole[top:bottom, left:right], part


def block_of(param: Any, dims: Sequence[MeshDim]) -> Block:
    """Return the matrix that the ranks along ``dims`` hold of ``param``, a 2-d DTensor.

    It is the whole matrix if ``dims`` are all the mesh dimensions that split it.
    Raises: ValueError if this rank's shard has another shape than the placements say.
    """
    mesh, along = param.device_mesh, tuple(dim for _, dim in dims)
    placements = tuple((getattr(p, "dim", -1), getattr(p, "split_factor", 1)) for p in param.placements)
    block = _block(tuple(param.shape), tuple(mesh.shape), placements, along, tuple(mesh.get_coordinate()))
    wanted, got = block.shape_at(block.mine), tuple(local(param).shape)
    if got != wanted:
        raise ValueError(
            f"of shape {list(param.shape)} has a shard of shape {list(got)}; expected {list(wanted)}, by its "
            f"placements {tuple(param.placements)} on {mesh}. Shard it with distribute_tensor or fully_shard."
        )
    return block


@lru_cache(maxsize=4096)  # large models repeat a few shapes
def _block(
    shape: Place, sizes: Place, placements: tuple[tuple[int, int], ...], along: Place, here: Place
) -> Block:
    places = [place[::-1] for place in product(*(range(sizes[dim]) for dim in reversed(along)))]
    lengths, runs = [], []
    for axis, size in enumerate(shape):
        parts = {}
        for place in places:
            coordinates = dict(enumerate(here)) | dict(zip(along, place, strict=True))
            index: Index = range(size)
            for dim, (split_axis, factor) in enumerate(placements):
                if split_axis == axis:
                    index = part_of(index, factor, sizes[dim], coordinates[dim])
            parts[place] = index
        distinct = set(parts.values())
        inside = {j: i for i, j in enumerate(sorted(set(chain.from_iterable(distinct))))}
        runs_of = {index: _runs([inside[j] for j in index]) for index in distinct}
        lengths.append(len(inside))
        runs.append({place: runs_of[index] for place, index in parts.items()})
    rows, columns = runs
    both = {place: (rows[place], columns[place]) for place in places}
    return Block((lengths[0], lengths[1]), both, tuple(here[dim] for dim in along))


def part_of(index: Index, factor: int, ranks: int, rank: int) -> Index:
    """Return the part of ``index`` on ``rank``: by Shard, or by _StridedShard with a split ``factor``."""
    if factor == 1:
        return _chunk(index, ranks, rank)
    pieces = (_chunk(_chunk(index, factor, i), ranks, rank) for i in range(factor))
    return tuple(chain.from_iterable(pieces))


def _chunk(index: Index, parts: int, i: int) -> Index:
    """Return the ``i``-th piece that torch.chunk makes of ``index``; it may be empty."""
    size = -(-len(index) // parts)
    return index[i * size : (i + 1) * size]


def _runs(index: list[int]) -> Runs:
    runs: list[tuple[int, int]] = []
    for i in index:
        start = runs.pop()[0] if runs and runs[-1][1] == i else i
        runs.append((start, i + 1))
    return tuple(runs)


def _with_starts(runs: Runs) -> list[tuple[int, int, int]]:
    """Return ``runs``, each with where it starts if they are put one after the other."""
    starts = accumulate((stop - start for start, stop in runs), initial=0)
    return [(*run, start) for run, start in zip(runs, starts, strict=False)]
