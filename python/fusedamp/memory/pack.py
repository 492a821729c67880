"""Packs weights and gradients contiguously into a few large buffers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

from .._C import advise_huge_pages
from ..tensors.layout import is_dense
from ..tensors.shards import PLAIN

_ALIGNMENT = 64  # bytes: a cache line, and more than any kernel's vectors need


class PackedParameters:
    """Buffers with the weights and gradients of some parameters; see :func:`pack_parameters`.

    Attributes:
        weights, gradients: one flat tensor per device and dtype; ``gradients`` is empty with
            ``gradients=False``.
    """

    def __init__(self, params: list[nn.Parameter], gradients: bool) -> None:
        places: dict[tuple[torch.device, torch.dtype], list[nn.Parameter]] = {}
        for param in params:
            places.setdefault((param.device, param.dtype), []).append(param)
        self.weights: list[Tensor] = []
        self.gradients: list[Tensor] = []
        self._grads: list[tuple[nn.Parameter, Tensor]] = []
        for some in places.values():
            buffer, views = _buffer(some)
            self.weights.append(buffer)
            for param, view in zip(some, views, strict=True):
                param.data = view.copy_(param.detach())
            if gradients:
                buffer, views = _buffer(some)
                self.gradients.append(buffer.zero_())
                self._grads += zip(some, views, strict=True)
        for param, view in self._grads:
            if param.grad is not None:
                view.copy_(param.grad)
            param.grad = view

    def zero_grad(self) -> None:
        """Set all gradients to zero in their buffers, and restore those that ``optimizer.zero_grad()``
        removed.

        Cost: writes each buffer once.
        """
        for buffer in self.gradients:
            buffer.zero_()
        for param, view in self._grads:
            if param.grad is not view:
                param.grad = view


def pack_parameters(
    params: nn.Module | Iterable[nn.Parameter], *, gradients: bool = True
) -> PackedParameters:
    """Move the weights of ``params`` and their gradients into one buffer per device and dtype.

    A step over thousands of small tensors waits for memory at the start of each. In contiguous buffers the
    hardware prefetches the next tensor, and on Linux the buffers use huge pages. Call this once, after the
    model has its device and dtype. Parameters remain the same objects with the same values::

        packed = fusedamp.pack_parameters(model)
        for batch in data:
            packed.zero_grad()  # instead of optimizer.zero_grad()
            loss(model, batch).backward()
            optimizer.step()

    Args:
        params: a module, a parameter, or parameters, dense in memory, on any devices. Those that require no
            gradient are left alone.
        gradients: also give each parameter a gradient in a buffer, zero or a copy of its current gradient. A
            parameter that is unused in a backward pass then has a zero gradient, as after
            ``optimizer.zero_grad(set_to_none=False)``. Pass False under DistributedDataParallel, whose own
            buckets hold the gradients with ``gradient_as_bucket_view=True``.
    Returns: the buffers.
    Raises: TypeError or ValueError naming the parameter, before anything is moved: for DTensors and other
        subclasses, and for parameters that share memory.
    Cost: temporary memory for a second copy of the weights. ``torch.save`` of a single weight saves its whole
        buffer: save the whole ``state_dict()``, or clones.
    """
    if isinstance(params, nn.Module):
        params = params.parameters()
    elif isinstance(params, nn.Parameter):  # iterating would give views of its rows
        params = [params]
    if not isinstance(params, Iterable):
        _is_trained(params)  # raises
    chosen = [param for param in params if _is_trained(param)]
    for i, param in enumerate(chosen):
        got = (
            f"[pack_parameters] parameter {i} of those that require gradients, of shape {list(param.shape)},"
        )
        if (
            type(param) not in PLAIN
            or not param.is_leaf
            or param.layout is not torch.strided
            or param.is_meta
        ):
            kind = (
                f"{type(param).__name__} on {param.device} with layout {param.layout}, leaf: {param.is_leaf}"
            )
            raise TypeError(f"{got} is a {kind}; expected a plain tensor with memory. Leave it out.")
        if not is_dense(param):
            raise ValueError(
                f"{got} has gaps or overlaps in memory (strides {list(param.stride())}); expected a dense "
                "tensor. Make it contiguous first, or leave it out."
            )
    spans = sorted((p.data_ptr(), p.data_ptr() + p.nbytes, i) for i, p in enumerate(chosen) if p.numel())
    for (_, end, i), (begin, _, j) in pairwise(spans):
        if begin < end:
            raise ValueError(
                f"[pack_parameters] parameters {i} and {j} share memory; expected memory of their own. Tie "
                "weights by using one Parameter object."
            )
    return PackedParameters(chosen, gradients)


def _is_trained(param: object) -> bool:
    if not isinstance(param, Tensor):
        raise TypeError(
            f"[pack_parameters] got a {type(param).__name__}; expected parameters, or a module that has them."
        )
    return param.requires_grad


def _buffer(params: list[nn.Parameter]) -> tuple[Tensor, Iterator[Tensor]]:
    """Return a flat tensor with room for tensors like ``params``, and views of it for them."""
    first, step = params[0], max(_ALIGNMENT // params[0].element_size(), 1)
    places, total = [], 0
    for param in params:
        places.append(total)
        total += -(-param.numel() // step) * step
    buffer = torch.empty(total, dtype=first.dtype, device=first.device)
    if first.device.type == "cpu":
        advise_huge_pages(buffer.data_ptr(), buffer.nbytes)
    return buffer, (buffer.as_strided(p.shape, p.stride(), at) for p, at in zip(params, places, strict=True))
