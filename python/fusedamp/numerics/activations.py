"""Counts gradients of activations, by hooks on the outputs of modules."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from .. import ops
from ..amp.flags import lasting, on
from ..ops import Numerics
from ..tensors.layout import is_dense
from ..tensors.shards import local
from .rings import Clock, Rows


class Activations:
    """The gradient of each leaf module's output, one row each; of several backward passes, all together.

    Args:
        model: its leaf modules get hooks.
        clock_of: the clock of a device.
        history: slots of the rings.
    """

    def __init__(self, model: nn.Module, clock_of: Callable[[torch.device], Clock], history: int) -> None:
        self._clock_of, self._history = clock_of, history
        self._by_device: dict[torch.device, Rows] = {}
        self._seen: set[tuple[torch.device, int]] = set()  # rows of the current step
        leaves = [(name, module) for name, module in model.named_modules() if not any(module.children())]
        self._names = tuple(f"{name or type(module).__name__} (activation)" for name, module in leaves)
        # Backward hooks of modules would forbid in-place operations on their outputs.
        self._hooks = [
            module.register_forward_hook(_Hook(self, index)) for index, (_, module) in enumerate(leaves)
        ]

    def remove(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def rows(self) -> list[Rows]:
        return list(self._by_device.values())

    def largest(self, device: torch.device) -> Tensor | None:
        """Return the largest |scaled gradient| of the current step as FP64, 0-d, on ``device``; None if there
        is none; no sync."""
        found = [on(rows.numerics.extremes[:, 0].amax(), device) for rows in self._by_device.values()]
        return torch.stack(found).amax() if self._seen else None

    def record(self, every: int, scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Write the current step into the rings, if it had a backward pass since the last call."""
        if not self._seen:
            return
        for device, rows in self._by_device.items():
            if scale is not None:
                rows.squares.div_(on(scale, device).double().square())
            rows.record(every, scale, found_inf, is_main=False, advance=False)
            rows.forget()
        self._seen.clear()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def follow(self, index: int, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and self._hooks:
                tensor.register_hook(partial(self._arrive, index))  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def _arrive(self, index: int, grad: Tensor) -> None:
        if self._hooks:  # not removed since the forward pass
            self._count(index, _readable(local(grad)))

    def _count(self, index: int, grad: Tensor) -> None:
        device = grad.device
        if device not in self._by_device:
            positions = range(len(self._names))
            clock = self._clock_of(device)
            self._by_device[device] = Rows(positions, clock, self._history, self._names)
        rows, row = self._by_device[device], slice(index, index + 1)
        extremes, histogram, due = rows.numerics
        with lasting():
            is_first = (device, index) not in self._seen
            self._seen.add((device, index))
            here = Numerics(extremes[row], histogram[row], due)
            if not is_first:
                here = Numerics(torch.zeros_like(here.extremes), torch.zeros_like(here.histogram), due)
            squares = ops.grad_numerics([grad], *here).per_tensor
            rows.squares[row] += squares  # 0 at first
            if not is_first:
                extremes[row, 0] = torch.maximum(extremes[row, 0], here.extremes[:, 0])
                extremes[row, 1:] += here.extremes[:, 1:]
                histogram[row] += here.histogram


class _Hook:
    """A forward hook, which does nothing in a pickle or copy of its module."""

    def __init__(self, activations: Activations, index: int) -> None:
        self._activations, self._index = weakref.ref(activations), index

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        if (activations := self._activations()) is not None:
            activations.follow(self._index, output)

    def __reduce__(self) -> Any:
        return partial, (_nothing,)


def _nothing(module: nn.Module, inputs: Any, output: Any) -> None:
    pass


def _readable(grad: Tensor) -> Tensor:
    """Return a real tensor that ops take: without gaps or overlaps."""
    if grad.layout is not torch.strided:
        grad = grad.to_dense()
    if not is_dense(grad) or grad.is_conj():
        grad = grad.clone(memory_format=torch.contiguous_format).resolve_conj()
    return torch.view_as_real(grad) if grad.is_complex() else grad
