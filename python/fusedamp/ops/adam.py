"""Steps that keep exponential averages of gradients and of their squares."""

from typing import Any, Unpack

from torch import Tensor

from . import checks
from .step import FOLLOW, Shared, Tensors, documented, run_step

_MOMENTS = dict(
    states="exp_avgs, exp_avg_sqs",
    cost=f"28 B/param with 16-bit weights and masters, {FOLLOW}; 28 B/param in fp32",
)
_ADAM = _MOMENTS | dict(states="exp_avgs, exp_avg_sqs, max_exp_avg_sqs (the last: empty without ``amsgrad``)")


@documented(
    title="AdamW",
    formula="Weight decay is decoupled: ``p -= lr * weight_decay * p``.",
    source="arXiv:1711.05101, Alg. 2; AMSGrad arXiv:1904.09237",
    **_ADAM,
)
def adamw_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    **shared: Unpack[Shared],
) -> None:
    states = _adam_states("adamw_", exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
    hyper = _moments("adamw_", betas, eps, weight_decay)
    run_step("adamw_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="Adam",
    formula="Weight decay enters the gradient: ``g += weight_decay * p``.",
    source="arXiv:1412.6980, Alg. 1; AMSGrad arXiv:1904.09237",
    **_ADAM,
)
def adam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    max_exp_avg_sqs: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    **shared: Unpack[Shared],
) -> None:
    states = _adam_states("adam_", exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
    hyper = _moments("adam_", betas, eps, weight_decay)
    run_step("adam_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="RAdam",
    formula="Weight decay enters the gradient, or with ``decoupled_weight_decay`` shrinks the weights. While "
    "the second moment has seen too little to be trusted (at most 5 samples' worth), the step is that of "
    "momentum alone.",
    source="arXiv:1908.03265, Alg. 2",
    **_MOMENTS,
)
def radam_(
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
    decoupled_weight_decay: bool = False,
    **shared: Unpack[Shared],
) -> None:
    states = dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs)
    decoupled = checks.flag("[radam_]", "decoupled_weight_decay", decoupled_weight_decay)
    hyper = _moments("radam_", betas, eps, weight_decay) | dict(decoupled=decoupled)
    run_step("radam_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="NAdam",
    formula="Momentum t is ``beta1 * (1 - 0.96^(t * momentum_decay) / 2)``. Weight decay enters the "
    "gradient, or with ``decoupled_weight_decay`` shrinks the weights. mu_products (one fp64 element per "
    "parameter, at first 1) are the products of all momentums so far; rewritten.",
    source="Dozat 2016, Alg. 2; torch.optim.NAdam",
    **_MOMENTS,
)
def nadam_(
    params: Tensors,
    grads: Tensors,
    exp_avgs: Tensors,
    exp_avg_sqs: Tensors,
    mu_products: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    **shared: Unpack[Shared],
) -> None:
    states = dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, mu_products=mu_products)
    decoupled = checks.flag("[nadam_]", "decoupled_weight_decay", decoupled_weight_decay)
    decay_base = 0.96 ** checks.number("[nadam_]", "momentum_decay", momentum_decay)
    hyper = _moments("nadam_", betas, eps, weight_decay) | dict(decoupled=decoupled, decay_base=decay_base)
    run_step("nadam_", params, grads, masters, states, steps, lr, hyper, shared)


def _moments(op: str, betas: tuple[float, float], eps: float, weight_decay: float) -> dict[str, Any]:
    beta1, beta2 = checks.numbers(f"[{op}]", "betas", betas)
    return dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)


def _adam_states(
    op: str, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors, amsgrad: bool
) -> dict[str, Tensors]:
    states = dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)
    checks.need_lists(op, **states)
    if checks.flag(f"[{op}]", "amsgrad", amsgrad) != (len(max_exp_avg_sqs) > 0) and exp_avgs:
        raise ValueError(
            f"[{op}] max_exp_avg_sqs has {len(max_exp_avg_sqs)} tensors with amsgrad={amsgrad}; expected one "
            "per param with amsgrad, none without"
        )
    return states
