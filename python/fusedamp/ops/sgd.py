"""Steps along a momentum."""

from typing import Unpack

from torch import Tensor

from . import checks
from .step import FOLLOW, Shared, Tensors, documented, need_momentum_buffers, run_step

_COST = f"20 B/param with 16-bit weights, masters and momentum, {FOLLOW}"


@documented(
    title="SGD",
    formula="A parameter's first step puts the gradient into its momentum buffer undampened, as in torch.",
    states="momentum_buffers (empty without momentum)",
    cost=_COST,
    source="Sutskever et al. 2013; torch.optim.SGD",
)
def sgd_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    **shared: Unpack[Shared],
) -> None:
    need_momentum_buffers("sgd_", params, momentum_buffers, momentum)
    hyper = dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
    states = dict(momentum_buffers=momentum_buffers)
    run_step("sgd_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="Lion",
    formula="Every element moves by ``lr``, in the direction of the sign. Weight decay is decoupled: "
    "``p -= lr * weight_decay * p``.",
    states="exp_avgs",
    cost=_COST,
    source="arXiv:2302.06675, Alg. 2",
)
def lion_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    weight_decay: float,
    **shared: Unpack[Shared],
) -> None:
    beta1, beta2 = checks.numbers("[lion_]", "betas", betas)
    hyper = dict(beta1=beta1, beta2=beta2, weight_decay=weight_decay)
    run_step("lion_", params, grads, masters, dict(exp_avgs=exp_avgs), steps, lr, hyper, shared)
