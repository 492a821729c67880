"""Steps that know norms of whole tensors.

A first pass measures them, of unscaled and clipped gradients and of the masters, in fp64 and in an order that
does not depend on threads or instruction set. CUDA's order is another one, so that these steps may differ
between CPU and CUDA in the last bits.
"""

import math
from typing import Unpack

from torch import Tensor

from . import checks
from .step import FOLLOW, Shared, Tensors, documented, run_step


@documented(
    title="LAMB",
    formula="Adam's direction plus ``weight_decay * p``, times the trust ratio: the norm of the tensor's "
    "weights over that of the direction, at most ``trust_clip``; 1 where one of them is 0, and without "
    "``adapt``.",
    states="exp_avgs, exp_avg_sqs",
    cost=f"42 B/param with 16-bit weights and masters, {FOLLOW} twice; 44 B/param in fp32",
    source="arXiv:1904.00962, Alg. 2",
)
def lamb_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    trust_clip: float = math.inf,
    adapt: bool = True,
    **shared: Unpack[Shared],
) -> None:
    beta1, beta2 = checks.numbers("[lamb_]", "betas", betas)
    hyper = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    hyper |= dict(bias_correction=bias_correction, trust_clip=trust_clip, adapt=adapt)
    states = dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    run_step("lamb_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="LARS",
    formula="SGD with momentum on ``ratio * (g + weight_decay * p)``, where the ratio is "
    "``trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)`` by the norms of the tensor; 1 where one "
    "of them is 0, and without ``adapt``.",
    states="momentum_buffers",
    cost=f"26 B/param with 16-bit weights and masters, {FOLLOW} twice; 28 B/param in fp32",
    source="arXiv:1708.03888, Alg. 1",
)
def lars_(
    params: Tensors,
    grads: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    nesterov: bool = False,
    adapt: bool = True,
    **shared: Unpack[Shared],
) -> None:
    hyper = dict(momentum=momentum, weight_decay=weight_decay, trust_coefficient=trust_coefficient, eps=eps)
    hyper |= dict(nesterov=nesterov, adapt=adapt)
    states = dict(momentum_buffers=momentum_buffers)
    run_step("lars_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="NovoGrad",
    formula="The gradient, divided by the root of its tensor's second moment, plus ``weight_decay * p`` "
    "enters the first moment, with ``grad_averaging`` times ``1 - beta1``. exp_avg_sqs (one fp64 element per "
    "parameter) are the second moments; rewritten.",
    states="exp_avgs",
    cost=f"26 B/param with 16-bit weights and masters, {FOLLOW} twice; 28 B/param in fp32",
    source="arXiv:1905.11286, Alg. 1",
)
def novograd_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_averaging: bool = False,
    **shared: Unpack[Shared],
) -> None:
    beta1, beta2 = checks.numbers("[novograd_]", "betas", betas)
    hyper = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay, grad_averaging=grad_averaging)
    states = dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    run_step("novograd_", params, grads, masters, states, steps, lr, hyper, shared)
