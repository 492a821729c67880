"""Brings sharded matrices to one rank each, and results back; adds up numbers over ranks.

Both are collective: all ranks of a mesh must call them with the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, product, repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from .shards import MeshDim, all_reduce_, local, sharded_dims

Spans = tuple[tuple[int, int], ...]  # ranges of indices, from the first to before the last
Place = tuple[int, ...]  # a rank's coordinates along some mesh dimensions


def split_over(tensor: Tensor, axis: int | None = None) -> tuple[MeshDim, ...]:
    """Return the mesh dimensions of several ranks that split ``tensor``, or only its dimension ``axis``.

    Empty for tensors that each rank has whole, and on ranks outside of the mesh.
    """
    return tuple(
        (mesh, dim)
        for mesh, dim in sharded_dims(tensor)
        if mesh.size(dim) > 1
        and mesh.get_coordinate() is not None
        and (axis is None or tensor.placements[dim].dim == axis % tensor.dim())  # type: ignore[attr-defined]
    )


def reduced_like(axis: int, tensor: Any) -> Tensor:
    """Return a template of a sum or mean of ``tensor`` along ``axis``, which stays, with one element.

    Of a DTensor it is replicated over the mesh dimensions that split ``axis``, and placed alike over others.
    """
    shard = local(tensor)
    shape, whole = list(shard.shape), list(tensor.shape)
    shape[axis] = whole[axis] = 1
    reduced = shard.new_empty(shape)
    if shard is tensor:
        return reduced
    from torch.distributed.tensor import DTensor, Replicate

    split = {dim for _, dim in sharded_dims(tensor) if tensor.placements[dim].dim == axis % tensor.dim()}
    placements = [Replicate() if dim in split else p for dim, p in enumerate(tensor.placements)]
    stride = torch.empty(whole, device="meta").stride()
    return DTensor.from_local(
        reduced, tensor.device_mesh, placements, run_check=False, shape=torch.Size(whole), stride=stride
    )


def add_up_(items: Iterable[tuple[Tensor, Sequence[MeshDim]]]) -> None:
    """Add up each tensor over the ranks along its mesh dimensions, in place; collective.

    Cost: one all-reduce per mesh dimension, of 8 bytes per element. Sums are FP64.
    """
    buckets: dict[MeshDim, list[Tensor]] = {}
    for tensor, dims in items:
        for dim in dims:
            buckets.setdefault(dim, []).append(tensor)
    for dim, tensors in buckets.items():
        home = tensors[0].device
        flat = torch.cat([tensor.reshape(-1).to(home, torch.float64) for tensor in tensors])
        all_reduce_(flat, [dim], "sum")
        for tensor, total in zip(tensors, torch.split(flat, [t.numel() for t in tensors]), strict=True):
            tensor.copy_(total.view_as(tensor))


@dataclass(frozen=True)
class Block:
    """A matrix whose shards are on the ranks along some mesh dimensions.

    Args:
        shape: of the matrix.
        parts: the rows and columns of each rank's shard.
        mine: this rank.
    """

    shape: tuple[int, int]
    parts: dict[Place, tuple[Spans, Spans]]
    mine: Place

    def shape_at(self, place: Place) -> tuple[int, int]:
        """Return the shape of the shard at ``place``."""
        rows, columns = self.parts[place]
        return _length(rows), _length(columns)

    def joined(self, shards: dict[Place, Tensor]) -> Tensor:
        """Put ``shards`` together."""
        pieces = [shard.view(self.shape_at(place)) for place, shard in shards.items()]
        if self._is_cut_by_rows(shards):
            return torch.cat(pieces)
        whole = pieces[0].new_empty(self.shape)
        for place, piece in zip(shards, pieces, strict=True):
            self._copy(place, piece, whole, back=False)
        return whole

    def split(self, whole: Tensor, places: Iterable[Place]) -> dict[Place, Tensor]:
        """Cut ``whole`` into the shards at ``places``, as flat tensors."""
        places = list(places)
        if self._is_cut_by_rows(places):
            pieces = torch.split(whole, [self.shape_at(place)[0] for place in places])
            return {place: piece.reshape(-1) for place, piece in zip(places, pieces, strict=True)}
        shards = {place: whole.new_empty(self.shape_at(place)) for place in places}
        for place, shard in shards.items():
            self._copy(place, shard, whole, back=True)
        return {place: shard.view(-1) for place, shard in shards.items()}

    def _is_cut_by_rows(self, places: Iterable[Place]) -> bool:
        """True if the shards at ``places`` are the rows of the matrix in order: then one copy joins them."""
        spans = [span for place in places for span in self.parts[place][0]]
        stops = [0, *(stop for _, stop in spans)]
        whole_rows = all(self.parts[place][1] == ((0, self.shape[1]),) for place in places)
        return whole_rows and [start for start, _ in spans] == stops[:-1]

    def _copy(self, place: Place, shard: Tensor, whole: Tensor, back: bool) -> None:
        rows, columns = self.parts[place]
        for row, (top, bottom) in zip(_starts(rows), rows, strict=True):
            for column, (left, right) in zip(_starts(columns), columns, strict=True):
                part = shard[row : row + bottom - top, column : column + right - left]
                inside = whole[top:bottom, left:right]
                part.copy_(inside) if back else inside.copy_(part)


def block_of(param: Any, dims: Sequence[MeshDim]) -> Block:
    """Return the matrix that the ranks along ``dims`` hold of ``param``, a 2-d DTensor.

    It is the whole matrix if ``dims`` are all the mesh dimensions that split it.
    Raises: ValueError if this rank's shard has another shape than the placements say.
    """
    mesh, along = param.device_mesh, tuple(dim for _, dim in dims)
    placements = tuple((getattr(p, "dim", -1), getattr(p, "split_factor", 1)) for p in param.placements)
    here = tuple(mesh.get_coordinate())
    block = _block(tuple(param.shape), tuple(mesh.shape), placements, along, here)
    wanted, got = block.shape_at(block.mine), tuple(param._local_tensor.shape)
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
    parts = {}
    for place in product(*(range(sizes[dim]) for dim in along)):
        coordinates = dict(enumerate(here)) | dict(zip(along, place, strict=True))
        spans = []
        for axis, size in enumerate(shape):
            some: Spans = ((0, size),)
            for dim, (split_axis, factor) in enumerate(placements):
                if split_axis == axis:
                    pieces = [_chunk(some, factor, i) for i in range(factor)]
                    cut = (_chunk(piece, sizes[dim], coordinates[dim]) for piece in pieces)
                    some = _merged(chain.from_iterable(cut))
            spans.append(some)
        parts[place] = (spans[0], spans[1])
    rows, columns = (_within({span for part in parts.values() for span in part[axis]}) for axis in (0, 1))
    inside = {place: (_moved(part[0], rows), _moved(part[1], columns)) for place, part in parts.items()}
    lengths = [sum(stop - start for start, stop in spans) for spans in (rows, columns)]
    return Block((lengths[0], lengths[1]), inside, tuple(here[dim] for dim in along))


def _length(spans: Iterable[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in spans)


def _starts(spans: Spans) -> list[int]:
    """Return where each of ``spans`` starts if they are put one after the other."""
    return list(accumulate((stop - start for start, stop in spans), initial=0))[: len(spans)]


def _chunk(spans: Spans, parts: int, i: int) -> Spans:
    """Return the ``i``-th of the pieces that torch.chunk makes of ``spans``; it may be empty."""
    size = -(-_length(spans) // parts)
    cut = (
        (max(start, start + i * size - before), min(stop, start + (i + 1) * size - before))
        for (start, stop), before in zip(spans, _starts(spans), strict=True)
    )
    return tuple((start, stop) for start, stop in cut if start < stop)


def _merged(spans: Iterable[tuple[int, int]]) -> Spans:
    merged: list[tuple[int, int]] = []
    for start, stop in spans:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, stop))
    return tuple(merged)


def _within(spans: set[tuple[int, int]]) -> dict[tuple[int, int], int]:
    """Return where each of ``spans`` starts among all of them."""
    ordered = tuple(sorted(spans))
    return dict(zip(ordered, _starts(ordered), strict=True))


def _moved(spans: Spans, starts: dict[tuple[int, int], int]) -> Spans:
    return tuple((starts[span], starts[span] + span[1] - span[0]) for span in spans)


class Exchange:
    """One round: at most one matrix per rank along ``dims`` is gathered there, and its result returns.

    Each direction is an all-to-all per mesh dimension: first of shards among the ranks along the first one,
    then of what these gathered along the next. Replicas exchange among themselves.

    Args:
        dims: the mesh dimensions along which the matrices are split; all have several ranks.
        blocks: the matrices. The one at index ``i`` goes to the ``i``-th rank along ``dims``.
    """

    def __init__(self, dims: Sequence[MeshDim], blocks: Sequence[Block]) -> None:
        self._device = torch.device(dims[0][0].device_type)
        self._groups = [mesh.get_group(dim) for mesh, dim in dims]
        self._sizes = [mesh.size(dim) for mesh, dim in dims]
        self._blocks, self._mine = blocks, blocks[0].mine
        self._owners = list(product(*map(range, self._sizes)))[: len(blocks)]
        self._arriving: tuple[Any, Tensor, list[tuple[int, Place]]] | None = None

    def gather(self, shards: Sequence[Tensor]) -> None:
        """Begin to send this rank's shard of each matrix; all are of one dtype and on one device."""
        self._home = shards[0].device
        if self._home.type == self._device.type:
            self._device = self._home
        flat = [shard.reshape(-1).to(self._device) for shard in shards]
        pieces = {(i, self._mine): shard for i, shard in enumerate(flat)}
        for k in range(len(self._sizes)):
            self._send(k, pieces if k == 0 else self._arrived(), flat[0], back=False)

    def matrices(self) -> dict[int, Tensor]:
        """Return the matrix that this rank owns, by its index, or nothing."""
        shards: dict[int, dict[Place, Tensor]] = {}
        for (i, place), shard in self._arrived().items():
            shards.setdefault(i, {})[place] = shard
        return {i: self._blocks[i].joined(some) for i, some in shards.items()}

    def scatter(self, results: Sequence[Tensor], dtype: torch.dtype) -> None:
        """Begin to send back ``results``, of :meth:`matrices` and in ``dtype``."""
        owned = [i for i, owner in enumerate(self._owners) if owner == self._mine]
        pieces: dict[tuple[int, Place], Tensor] = {}
        like = torch.empty(0, dtype=dtype, device=self._device)
        for i, whole in zip(owned, results, strict=True):
            shards = self._blocks[i].split(whole, self._held(len(self._sizes), self._mine))
            pieces |= {(i, place): shard for place, shard in shards.items()}
        for k in reversed(range(len(self._sizes))):
            self._send(k, pieces if k == len(self._sizes) - 1 else self._arrived(), like, back=True)

    def shards(self) -> list[Tensor]:
        """Return this rank's shard of each result."""
        shards = self._arrived()
        shapes = [block.shape_at(self._mine) for block in self._blocks]
        return [shards[i, self._mine].view(shape).to(self._home) for i, shape in enumerate(shapes)]

    def _held(self, k: int, place: Place) -> list[Place]:
        """Return whose shards are at ``place`` after the first ``k`` dimensions are gathered."""
        first = product(*map(range, reversed(self._sizes[:k])))
        return [(*reversed(some), *place[k:]) for some in first]

    def _send(self, k: int, pieces: dict[tuple[int, Place], Tensor], like: Tensor, back: bool) -> None:
        """Begin the exchange of ``pieces`` along dimension ``k``: to the owners, or ``back``."""
        here, ranks = self._mine, range(self._sizes[k])
        passing: list[list[int]] = [[] for _ in ranks]  # the matrices that come this way, by their owner
        for i, owner in enumerate(self._owners):
            if owner[:k] == here[:k]:
                passing[owner[k]].append(i)
        at = [self._held(k, (*here[:k], rank, *here[k + 1 :])) for rank in ranks]
        out = [[(i, place) for i in passing[rank] for place in at[here[k]]] for rank in ranks]
        into = [[(i, place) for i in passing[here[k]] for place in at[rank]] for rank in ranks]
        if back:
            out, into = into, out
        width = like.element_size()
        sent = [like.new_empty(0), *(pieces[key] for keys in out for key in keys)]
        received = like.new_empty(sum(self._numel(key) for keys in into for key in keys))
        # As bytes: not every backend sends 16-bit floats.
        work = torch.distributed.all_to_all_single(
            received.view(torch.uint8),
            torch.cat(sent).view(torch.uint8),
            [width * sum(map(self._numel, keys)) for keys in into],
            [width * sum(map(self._numel, keys)) for keys in out],
            group=self._groups[k],
            async_op=True,
        )
        self._arriving = work, received, [key for keys in into for key in keys]

    def _numel(self, key: tuple[int, Place]) -> int:
        i, place = key
        return prod(self._blocks[i].shape_at(place))

    def _arrived(self) -> dict[tuple[int, Place], Tensor]:
        """Wait for the last exchange (on CUDA the stream waits, not the host)."""
        assert self._arriving is not None
        (work, received, keys), self._arriving = self._arriving, None
        work.wait()
        return dict(zip(keys, torch.split(received, list(map(self._numel, keys))), strict=True))


def overlapped(rounds: Iterable[Iterator[None]]) -> None:
    """Run ``rounds`` so that what one sends travels while others compute.

    Each yields twice, after it began to send: shards to owners, and results back. When a round begins, the
    one before it goes on, and then the one before that ends.
    """
    active: list[Iterator[None]] = []
    for one in chain(rounds, repeat(iter(()), 2)):
        active = [some for some in (one, *active) if next(some, True) is None]
