"""Buckets of parameters that cross between device and host together, and their memory on the host."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter

from ...tensors.shards import local
from .link import Direction, Done, Link

FULL = 32 << 20  # bytes of weights per bucket; larger tensors have one each
SMALL = 1 << 20  # bytes; smaller tensors of a bucket cross in one copy
_ALIGNMENT = 16  # bytes: of the largest element, complex128


class Twin:
    """A parameter, and ``home``, its weight on the host, which the host's optimizer steps.

    ``home`` has no initialized memory until a bucket gives it some.
    """

    def __init__(self, param: Tensor, handle: Any) -> None:
        self.param, self.handle = param, handle  # of a hook; it has a remove()
        self.home: Any = Parameter(torch.empty_like(local(param), device="cpu"), requires_grad=False)
        vars(self.home)["main_grad"] = None
        vars(self.home)["shard_of"] = param  # whose places in the whole tensor its random numbers have
        self.bucket: Bucket | None = None
        self.layout: tuple[Any, ...] = ()
        self.seen: tuple[Any, ...] | None = None  # :func:`versions` of the weight that ``home`` equals

    def has_moved(self) -> bool:
        """True if the parameter has another device, dtype or layout than its bucket was made for."""
        return self.layout != _layout(local(self.param))

    def is_current(self) -> bool:
        """True if ``home`` has the parameter's weight, by its version counter and memory."""
        now = versions(self.param)
        return now is not None and now == self.seen


def _layout(source: Tensor) -> tuple[Any, ...]:
    return source.device, source.dtype, source.shape, source.stride()


def versions(tensor: Tensor) -> tuple[Any, ...] | None:
    """Return version counters and identity of the memory; None if there is no counter, as of inference mode's
    tensors. An address would not do: other memory may get it later."""
    shard = local(tensor)
    if tensor.is_inference() or shard.is_inference():
        return None
    storage = StorageWeakRef(shard.untyped_storage())  # type: ignore[no-untyped-call]
    return tensor._version, shard._version, storage, shard.storage_offset()


class Bucket:
    """Some parameters on one device. Their weights, and their gradients, are contiguous on the host."""

    def __init__(self, link: Link, twins: list[Twin]) -> None:
        self.link, self.twins = link, twins
        self._pools = link.pools and len(twins) > 1 and all(_bytes(twin.param) < SMALL for twin in twins)
        sources = [local(twin.param) for twin in twins]
        dense = [torch.empty_like(source, device="meta") for source in sources]
        self._weights = link.host_bytes(_views(None, dense)[1])
        for twin, view, source in zip(twins, _views(self._weights, dense)[0], sources, strict=True):
            twin.home.data = view
            twin.bucket, twin.layout, twin.seen = self, _layout(source), None
        self._grads = torch.empty(0, dtype=torch.uint8, device="cpu")
        self._grad_views: list[Tensor] = []
        self._landing: Done | None = None
        self._fetched: list[tuple[Tensor | None, Any]] = []  # keeps the gradients alive while they are copied
        self._arrived: set[int] = set()
        self.stored: Done | None = None

    def arrive(self, twin: Twin) -> bool:
        """Note that a backward pass finished a gradient; True if it was the bucket's last."""
        self._arrived.add(id(twin))
        self.link.meet("down")
        if len(self._arrived) < len(self.twins):
            return False
        self._arrived.clear()
        return True

    def fetch(self, grads: Sequence[Tensor | None]) -> None:
        """Queue the copy of the gradients to the host: strided, one per parameter, or None."""
        sources = [None if grad is None else local(grad.detach()) for grad in grads]
        self._make_room(
            [home.dtype if s is None else s.dtype for s, home in zip(sources, self._homes(), strict=True)]
        )
        self._fetched = [(grad, None if grad is None else versions(grad)) for grad in grads]
        work = partial(self._carry, "down", self._grads, self._grad_views, sources, self._pools)
        self._landing = self.link.run("down", work)

    def _homes(self) -> list[Tensor]:
        return [twin.home for twin in self.twins]

    def _make_room(self, dtypes: list[torch.dtype]) -> None:
        if [view.dtype for view in self._grad_views] == dtypes:
            return
        like = [
            torch.empty_like(home, dtype=d, device="meta")
            for home, d in zip(self._homes(), dtypes, strict=True)
        ]
        self._grads = self.link.host_bytes(_views(None, like)[1])
        self._grad_views = _views(self._grads, like)[0]

    def has(self, grads: Sequence[Tensor | None]) -> bool:
        """True if these gradients were fetched and not modified since, by their version counters."""
        return self._landing is not None and all(
            grad is None or (grad is known and seen is not None and versions(grad) == seen)
            for grad, (known, seen) in zip(grads, self._fetched, strict=True)
        )

    def gradient(self, index: int) -> Tensor:
        """Return the host's memory of a fetched gradient; valid after :meth:`land`."""
        return self._grad_views[index]

    def land(self) -> None:
        """Make the host wait for the gradients."""
        if self._landing is not None:
            self._landing.wait()

    def read_weights(self, twins: set[Twin]) -> Done:
        """Queue the copy of weights to the host."""
        sources = [local(twin.param).detach() if twin in twins else None for twin in self.twins]
        pools = self._pools and len(twins) == len(self.twins)  # else the pool would overwrite the others
        for twin in twins:
            twin.seen = versions(twin.param)
        work = partial(self._carry, "down", self._weights, self._homes(), sources, pools)
        return self.link.run("down", work)

    def store(self, twins: set[Twin]) -> None:
        """Queue the copy of stepped weights to the device."""
        targets = [local(twin.param).data if twin in twins else None for twin in self.twins]
        work = partial(self._carry, "up", self._weights, self._homes(), targets, self._pools)
        self.stored = self.link.run("up", work)
        for twin in twins:
            for written in {id(t): t for t in (twin.param, local(twin.param))}.values():
                if not written.is_inference():
                    torch.autograd.graph.increment_version(written)
            twin.seen = versions(twin.param)

    def forget(self) -> None:
        """End a step: what was fetched is not used again."""
        self._landing, self._fetched, self.stored = None, [], None
        self._arrived.clear()

    @torch.no_grad()
    def _carry(
        self,
        direction: Direction,
        memory: Tensor,
        views: list[Tensor],
        tensors: list[Tensor | None],
        pools: bool,
    ) -> None:
        """Copy between ``views`` of the host's ``memory`` and the device's ``tensors``."""
        present = [(view, tensor) for view, tensor in zip(views, tensors, strict=True) if tensor is not None]
        if pools and len(present) > 1:
            pool = torch.empty_like(memory, device=present[0][1].device)
            staged = [view for view, t in zip(_views(pool, views)[0], tensors, strict=True) if t is not None]
            if direction == "down":
                _copy_all(staged, [tensor for _, tensor in present])
                self.link.cross(memory, pool)
            else:
                self.link.cross(pool, memory)
                _copy_all([tensor for _, tensor in present], staged)
            return
        for view, tensor in present:
            dense = tensor
            if tensor.stride() != view.stride() or tensor.is_conj() or tensor.is_neg():
                dense = torch.empty_strided(view.shape, view.stride(), dtype=view.dtype, device=tensor.device)
            if direction == "down":
                if dense is not tensor:
                    dense.copy_(tensor)
                self.link.cross(_flat(view), _flat(dense))
            else:
                self.link.cross(_flat(dense), _flat(view))
                if dense is not tensor:
                    tensor.copy_(dense)


def fill(twins: Iterable[Twin], link_to: Callable[[torch.device], Link]) -> list[Bucket]:
    """Give ``twins`` to new buckets in their order, small and large ones apart."""
    buckets: list[Bucket] = []
    unfinished: dict[tuple[torch.device, bool], list[Twin]] = {}
    sizes: dict[tuple[torch.device, bool], int] = {}
    for twin in twins:
        size = _bytes(twin.param)
        key = (local(twin.param).device, size < SMALL)
        if key in unfinished and sizes[key] + size > FULL:
            buckets.append(Bucket(link_to(key[0]), unfinished.pop(key)))
        unfinished.setdefault(key, []).append(twin)
        sizes[key] = size + (sizes[key] if len(unfinished[key]) > 1 else 0)
    return buckets + [Bucket(link_to(device), some) for (device, _), some in unfinished.items()]


def _bytes(param: Tensor) -> int:
    source = local(param)
    return source.numel() * source.element_size()


def _views(memory: Tensor | None, likes: Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """Return views of ``memory`` like dense tensors, one after the other, and the bytes that they need."""
    views, end = [], 0
    for like in likes:
        start = -(-end // _ALIGNMENT) * _ALIGNMENT
        end = start + like.numel() * like.element_size()
        if memory is not None:
            view = memory[start:end].view(like.dtype)
            views.append(view.as_strided(like.shape, like.stride()))
    return views, end


def _flat(dense: Tensor) -> Tensor:
    return dense.as_strided((dense.numel(),), (1,))


def _copy_all(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Copy between tensors of one device, with few launches: torch's fast path takes one dtype."""
    for dtype in dict.fromkeys(target.dtype for target in targets):
        some = [(t, s) for t, s in zip(targets, sources, strict=True) if t.dtype is dtype]
        torch._foreach_copy_([t for t, _ in some], [s for _, s in some])
