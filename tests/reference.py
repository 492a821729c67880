"""Optimizers typed from their papers, in plain tensor algebra and FP64: what the kernels are held against.

Independent of the package on purpose, so that a formula that is wrong there is wrong here only by chance.
Each function takes one parameter, its gradient and its state (a dict, changed in place; empty at first) and
returns the new parameter. Symbols are the papers'.
"""

import torch
from torch import Tensor


def adam(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Tensor:
    """Kingma and Ba 2015, Alg. 1; decoupled: Loshchilov and Hutter 2019, Alg. 2; amsgrad: Reddi et al. 2018.

    As in torch, eta is 1, the learning rate multiplies the decoupled decay, and amsgrad keeps the maximum of
    the second moment before its bias correction.
    """
    beta1, beta2 = betas
    t = state["step"] = state.get("step", 0) + 1
    if maximize:
        g = -g
    if not decoupled_weight_decay:
        g = g + weight_decay * theta
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0 * theta) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * theta) + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = torch.maximum(state.get("max_exp_avg_sq", 0 * theta), v)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    decay = lr * weight_decay * theta if decoupled_weight_decay else 0.0
    return theta - lr * m_hat / (v_hat.sqrt() + eps) - decay


def adamw(theta: Tensor, g: Tensor, state: dict, *, weight_decay: float = 1e-2, **options) -> Tensor:
    return adam(theta, g, state, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def sgd(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Tensor:
    """Sutskever et al. 2013, with the velocity in units of gradients and torch's undampened first step."""
    first = "momentum_buffer" not in state
    state["step"] = state.get("step", 0) + 1
    d = (-g if maximize else g) + weight_decay * theta
    if momentum:
        velocity = d if first else momentum * state["momentum_buffer"] + (1 - dampening) * d
        state["momentum_buffer"] = velocity
        d = d + momentum * velocity if nesterov else velocity
    return theta - lr * d
