"""Adafactor."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from itertools import chain
from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.checks import need_length, refuse
from ..tensors.blocks import reduced_like, split_over
from ..tensors.exchange import add_up_
from ..tensors.shards import MeshDim
from .core.batch import Group
from .core.composed import ComposedOptimizer, Update
from .core.options import FINITE, NOT_NEGATIVE, Bounds
from .state.formats import Storage, options
from .state.spec import StateSpec


def _is_factored(param: Tensor, group: Group) -> bool:
    return param.dim() > 1


_MEAN_OVER = {"row_var": -1, "col_var": -2}  # state -> dimension
_CHUNK = 2**24  # elements per rank of sharded tensors that are updated together
Sums = list[tuple[Tensor, tuple[MeshDim, ...]]]


class Adafactor(ComposedOptimizer):
    """``torch.optim.Adafactor`` with FP32 master weights; unscaling, clipping and the overflow skip run on
    the device.

    Args:
        params, lr, beta2_decay, eps, d, weight_decay, maximize: as in torch; ``eps[0]`` None is the machine
            epsilon of the arithmetic (FP32, also for 16-bit parameters; torch uses that of the parameter's
            dtype). ``lr`` may be a tensor of one element, which is read on the device at each step.
        foreach: accepted and saved, without effect. A CUDA graph can capture the step after a first step has
            created the state; torch's step reads norms and step counts on the host.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``; ``row_var`` and ``col_var`` over the last two dimensions for tensors with at least two,
        ``variance`` for others; and ``master``.
    Cost: about 25 passes over the parameter by torch operations, with two FP32 temporaries of its size; no
        host sync. Norms may differ in the last bits between devices, thread counts and numbers of ranks.
        Sharded DTensors: four all-reduces per mesh dimension, of 8 bytes per element of a mean over a sharded
        dimension and 32 bytes per parameter; large shards need three more for each 2^24 elements of a rank.
    Source: Shazeer and Stern 2018, arXiv:1804.04235, Alg. 4 and 5, with torch's ``lr`` and ``eps``.
    """

    op = "Adafactor"
    bounds = {"d": Bounds(low=1.0), "beta2_decay": FINITE}
    states = (
        StateSpec("row_var", like=partial(reduced_like, -1), required=True, of=_is_factored),
        StateSpec("col_var", like=partial(reduced_like, -2), required=True, of=_is_factored),
        StateSpec("variance", required=True, of=lambda param, group: not _is_factored(param, group)),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        beta2_decay: float = -0.8,
        eps: tuple[float | None, float] = (None, 1e-3),
        d: float = 1.0,
        weight_decay: float = 0.0,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)

    def _check_group(self, where: str, group: Group) -> None:
        super()._check_group(where, group)
        need_length(where, "eps", group["eps"], 2)
        eps1, eps2 = group["eps"]
        if eps1 is not None:
            NOT_NEGATIVE.check(where, "eps[0]", eps1)
        NOT_NEGATIVE.check(where, "eps[1]", eps2)
        if group["beta2_decay"] > 0:
            refuse(where, "beta2_decay", group["beta2_decay"], "a number <= 0, such as -0.8")

    def _run(self, updates: list[Update]) -> None:
        for some in _in_chunks(updates):
            for sums in zip(*map(self._rule, some), strict=True):
                add_up_(chain.from_iterable(sums))

    def _rule(self, update: Update) -> Iterator[Sums]:
        """Make ``update``; yields sums of this rank's shard, and goes on when they are those of the whole."""
        update.start()
        group, param, weight, grad = update.group, update.param, update.weight, update.grad
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(weight.dtype).eps if eps1 is None else float(eps1)
        root = math.sqrt(max(param.numel(), 1))
        fresh = update.count.pow(float(group["beta2_decay"])).to(weight.dtype)  # 1 - beta2 of this step
        relative = update.count.rsqrt().clamp(max=update.lr)
        size = _square_of_norm(weight)

        if _is_factored(param, group):
            totals = {name: _squares_along(axis, grad) for name, axis in _MEAN_OVER.items()}
            over = [(totals[name], split_over(param, axis)) for name, axis in _MEAN_OVER.items()]
            yield [(size, update.split_over), *over]
            means = {name: totals[name] / max(param.size(axis), 1) for name, axis in _MEAN_OVER.items()}
            new = {name: torch.lerp(update.states[name], mean, fresh) for name, mean in means.items()}
            sum_of_rows = new["row_var"].sum(-2, keepdim=True)
            yield [(sum_of_rows, split_over(param, -2))]
            mean_of_rows = sum_of_rows / max(param.size(-2), 1)
            estimate = new["row_var"] * new["col_var"] / mean_of_rows.clamp(min=eps1)
        else:
            yield [(size, update.split_over)]
            new = {"variance": torch.lerp(update.states["variance"], grad.square(), fresh)}
            estimate = new["variance"]
            yield []
        change = grad * estimate.clamp(min=eps1 * eps1).rsqrt()
        length = _square_of_norm(change)
        yield [(length, update.split_over)]
        rate = (size.sqrt().to(weight.dtype) / root).clamp(min=float(eps2)) * relative.to(weight.dtype)
        rate = rate / (length.sqrt().to(weight.dtype) / (root * float(group["d"]))).clamp(min=1.0)
        decay = update.lr * float(group["weight_decay"])
        if isinstance(decay, Tensor):
            decay = decay.to(weight.dtype)
        update.finish(weight - decay * weight - rate * change, new)


def _in_chunks(updates: list[Update]) -> Iterator[list[Update]]:
    """Yield ``updates`` in order, those of small shards together: they share all-reduces and memory."""
    some: list[Update] = []
    free = _CHUNK
    for update in updates:
        numel = update.param.numel() // math.prod(mesh.size(dim) for mesh, dim in update.split_over)
        if some and numel > free:
            yield some
            some, free = [], _CHUNK
        some.append(update)
        free -= numel
    if some:
        yield some


def _squares_along(axis: int, grad: Tensor) -> Tensor:
    """Sum up squares along ``axis``; empty sums are 0."""
    # Squaring a norm needs no temporary of the gradient's size.
    norm: Tensor = torch.linalg.vector_norm(grad, dim=axis, keepdim=True)
    return norm.square()


def _square_of_norm(tensor: Tensor) -> Tensor:
    """Return the square as an FP64 tensor, whose root is the norm again."""
    norm: Tensor = torch.linalg.vector_norm(tensor)
    return norm.double().square()
