"""Brings sharded matrices to one rank each and results back, and adds up numbers over ranks.

Both are collective: all ranks of a mesh must call them with the same tensors in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import chain, product, repeat
from math import prod
from typing import Any

import torch
from torch import Tensor

from .blocks import Block, Place
from .shards import MeshDim, all_reduce_

Key = tuple[int, Place]  # the shard of a matrix, by its index, that is or was on a rank


def add_up_(items: Iterable[tuple[Tensor, Sequence[MeshDim]]]) -> None:
    """Add up each tensor over the ranks along its mesh dimensions, in place; collective.

    Cost: one all-reduce per mesh dimension, in FP64.
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


class Exchange:
    """One round: at most one matrix per rank along ``dims`` is gathered there, and its result returns.

    Each direction is an all-to-all per mesh dimension: first of shards among the ranks along the first one,
    then of what these gathered along the next. Replicas exchange among themselves.

    Args:
        dims: the mesh dimensions that split the matrices.
        blocks: the matrices. The one at index ``i`` goes to the ``i``-th rank along ``dims``.
        device: of the shards.
    """

    def __init__(self, dims: Sequence[MeshDim], blocks: Sequence[Block], device: torch.device) -> None:
        self._groups = [mesh.get_group(dim) for mesh, dim in dims]
        self._sizes = [mesh.size(dim) for mesh, dim in dims]
        self._blocks, self._mine, self._home = blocks, blocks[0].mine, device
        self._owners = list(product(*map(range, self._sizes)))[: len(blocks)]
        kind = dims[0][0].device_type  # of what the mesh sends: shards may be offloaded to the CPU
        self._device = device if device.type == kind else torch.device(kind)
        self._arriving: tuple[Any, Tensor, list[Key]] | None = None

    def gather(self, shards: Sequence[Tensor]) -> None:
        """Begin to send this rank's shard of each matrix; all are of one dtype."""
        pieces = {(i, self._mine): shard.reshape(-1).to(self._device) for i, shard in enumerate(shards)}
        for k in range(len(self._sizes)):
            self._send(k, pieces if k == 0 else self._arrived(), shards[0].dtype, back=False)

    def matrices(self) -> dict[int, Tensor]:
        """Return the matrix that arrived at this rank, by its index, or nothing."""
        shards: dict[int, list[Tensor]] = {}
        for (i, _), shard in self._arrived().items():
            shards.setdefault(i, []).append(shard)
        return {i: self._blocks[i].joined(some) for i, some in shards.items()}

    def scatter(self, results: Mapping[int, Tensor], dtype: torch.dtype) -> None:
        """Begin to send back ``results``, made of :meth:`matrices`, in ``dtype``."""
        pieces = {
            (i, place): shard
            for i, result in results.items()
            for place, shard in zip(self._blocks[i].parts, self._blocks[i].cut(result), strict=True)
        }
        last = len(self._sizes) - 1
        for k in range(last, -1, -1):
            self._send(k, pieces if k == last else self._arrived(), dtype, back=True)

    def shards(self) -> list[Tensor]:
        """Return this rank's shard of each result."""
        shards = self._arrived()
        shapes = [block.shape_at(self._mine) for block in self._blocks]
        return [shards[i, self._mine].view(shape).to(self._home) for i, shape in enumerate(shapes)]

    def _held(self, k: int, place: Place) -> list[Place]:
        """Return whose shards are at ``place`` after the first ``k`` dimensions are gathered."""
        first = product(*map(range, reversed(self._sizes[:k])))
        return [(*reversed(some), *place[k:]) for some in first]

    def _send(self, k: int, pieces: Mapping[Key, Tensor], dtype: torch.dtype, back: bool) -> None:
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
        numels = [[sum(map(self._numel, keys)) for keys in some] for some in (into, out)]
        received = torch.empty(sum(numels[0]), dtype=dtype, device=self._device)
        sent = torch.cat([received[:0], *(pieces[key] for key in chain.from_iterable(out))])
        # As bytes: not every backend sends 16-bit floats.
        to, of = ([dtype.itemsize * n for n in some] for some in numels)
        tensors = received.view(torch.uint8), sent.view(torch.uint8)
        work = torch.distributed.all_to_all_single(*tensors, to, of, group=self._groups[k], async_op=True)
        self._arriving = work, received, list(chain.from_iterable(into))

    def _numel(self, key: Key) -> int:
        i, place = key
        return prod(self._blocks[i].shape_at(place))

    def _arrived(self) -> dict[Key, Tensor]:
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
