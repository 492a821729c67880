"""Adafactor."""

from __future__ import annotations

import math
from functools import partial
from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops.checks import need_length, refuse
from .core.batch import Group
from .core.composed import ComposedOptimizer, Values
from .core.options import FINITE, NOT_NEGATIVE, Bounds
from .state.formats import Storage, options
from .state.spec import StateSpec


def _is_factored(param: Tensor, group: Group) -> bool:
    return param.dim() > 1


def _mean_over(dim: int, param: Tensor) -> Tensor:
    shape = list(param.shape)
    shape[dim] = 1
    return param.new_empty(shape)


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
        host sync. Norms may differ in the last bits between devices and thread counts.
    Source: Shazeer and Stern 2018, arXiv:1804.04235, Alg. 4 and 5, with torch's ``lr`` and ``eps``.
    """

    op = "Adafactor"
    bounds = {"d": Bounds(low=1.0), "beta2_decay": FINITE}
    states = (
        StateSpec("row_var", like=partial(_mean_over, -1), required=True, of=_is_factored),
        StateSpec("col_var", like=partial(_mean_over, -2), required=True, of=_is_factored),
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

    def _rule(
        self, group: Group, lr: float | Tensor, weight: Tensor, grad: Tensor, states: Values, step: Tensor
    ) -> tuple[Tensor, Values]:
        eps1, eps2 = group["eps"]
        eps1 = torch.finfo(weight.dtype).eps if eps1 is None else float(eps1)
        root = math.sqrt(max(weight.numel(), 1))
        fresh = step.pow(float(group["beta2_decay"])).to(weight.dtype)  # 1 - beta2 of this step
        relative = step.rsqrt().clamp(max=lr)
        rms = torch.linalg.vector_norm(weight) / root
        rate = rms.clamp(min=float(eps2)) * relative.to(weight.dtype)

        means = _mean_squares(grad)
        new = {name: torch.lerp(states[name], mean, fresh) for name, mean in means.items()}
        if "variance" in new:
            estimate = new["variance"]
        else:
            rows, columns = new["row_var"], new["col_var"]
            estimate = rows * columns / _mean(rows, -2).clamp(min=eps1)
        update = grad * estimate.clamp(min=eps1 * eps1).rsqrt()
        length = torch.linalg.vector_norm(update) / (root * float(group["d"]))
        rate = rate / length.clamp(min=1.0)
        decay = lr * float(group["weight_decay"])
        if isinstance(decay, Tensor):
            decay = decay.to(weight.dtype)
        return weight - decay * weight - rate * update, new


def _mean_squares(grad: Tensor) -> Values:
    """Compute means of squares along the last two dimensions, or the squares of a vector; empty sums are
    0."""
    if grad.dim() < 2:
        return {"variance": grad.square()}
    norm = torch.linalg.vector_norm  # squaring a norm needs no temporary of the gradient's size
    return {
        "row_var": norm(grad, dim=-1, keepdim=True).square() / max(grad.size(-1), 1),
        "col_var": norm(grad, dim=-2, keepdim=True).square() / max(grad.size(-2), 1),
    }


def _mean(tensor: Tensor, dim: int) -> Tensor:
    return tensor.sum(dim, keepdim=True) / max(tensor.size(dim), 1)
