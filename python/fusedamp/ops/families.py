"""The step ops, one declaration each: its docstring's parts, and a signature that names lists and options.

Layerwise ones (lamb_, lars_, novograd_) know norms of whole tensors. A first pass measures them, of unscaled
and clipped gradients and of the masters, in fp64 and in an order that does not depend on threads or
instruction set. CUDA's order is another one, so that these steps may differ between CPU and CUDA in the last
bits.
"""

import math
from typing import Unpack

from .declaration import Betas, Rate, Scalars, Shared, step_op
from .step import Tensors

_FOLLOW = "and the 2 B that see whether the weight was modified"
_16 = "B/param with 16-bit weights"
_MOMENTS = f"28 {_16} and masters, {_FOLLOW}; 28 B/param in fp32"
_MOMENTUM = f"20 {_16}, masters and momentum, {_FOLLOW}"
_SQUARES = f"20 {_16} and masters, {_FOLLOW}"
_NORM = f"26 {_16} and masters, {_FOLLOW} twice; 28 B/param in fp32"
_NORMS = f"42 {_16} and masters, {_FOLLOW} twice; 44 B/param in fp32"
_RMSPROP = "Tieleman & Hinton 2012, Lecture 6.5; torch.optim.RMSprop"

# fmt: off


@step_op(
    "AdamW", "Weight decay is decoupled: ``p -= lr * weight_decay * p``.",
    _MOMENTS, "arXiv:1711.05101, Alg. 2; AMSGrad arXiv:1904.09237", last_state_with="amsgrad")
def adamw_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors,
    masters: Tensors, steps: Tensors, *, lr: Rate, betas: Betas, eps: float, weight_decay: float,
    amsgrad: bool = False, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "Adam", "Weight decay enters the gradient: ``g += weight_decay * p``.",
    _MOMENTS, "arXiv:1412.6980, Alg. 1; AMSGrad arXiv:1904.09237", last_state_with="amsgrad")
def adam_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, max_exp_avg_sqs: Tensors,
    masters: Tensors, steps: Tensors, *, lr: Rate, betas: Betas, eps: float, weight_decay: float,
    amsgrad: bool = False, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "RAdam", "Weight decay enters the gradient, or with ``decoupled_weight_decay`` shrinks the weights. "
    "While the second moment has seen too little to be trusted (at most 5 samples' worth), the step is that "
    "of momentum alone.", _MOMENTS, "arXiv:1908.03265, Alg. 2")
def radam_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, masters: Tensors,
    steps: Tensors, *, lr: Rate, betas: Betas, eps: float, weight_decay: float,
    decoupled_weight_decay: bool = False, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "NAdam", "Momentum t is ``beta1 * (1 - 0.96^(t * momentum_decay) / 2)``. Weight decay enters the "
    "gradient, or with ``decoupled_weight_decay`` shrinks the weights. mu_products (one fp64 element per "
    "parameter, at first 1) are the products of all momentums so far; rewritten.",
    _MOMENTS, "Dozat 2016, Alg. 2; torch.optim.NAdam")
def nadam_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, mu_products: Scalars,
    masters: Tensors, steps: Tensors, *, lr: Rate, betas: Betas, eps: float, weight_decay: float,
    momentum_decay: float = 4e-3, decoupled_weight_decay: bool = False, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "SGD", "A parameter's first step puts the gradient into its momentum buffer undampened, as in torch.",
    _MOMENTUM, "Sutskever et al. 2013; torch.optim.SGD", last_state_with="momentum")
def sgd_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, masters: Tensors, steps: Tensors, *, lr: Rate,
    momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
    **shared: Unpack[Shared]) -> None: ...


@step_op(
    "Lion", "Every element moves by ``lr``, in the direction of the sign. Weight decay is decoupled: "
    "``p -= lr * weight_decay * p``.", _MOMENTUM, "arXiv:2302.06675, Alg. 2")
def lion_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, masters: Tensors, steps: Tensors, *, lr: Rate,
    betas: Betas, weight_decay: float, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "Adagrad", "The rate of step t is ``lr / (1 + (t - 1) * lr_decay)``. Weight decay enters the gradient.",
    _SQUARES, "Duchi et al. 2011, JMLR 12, Fig. 1; torch.optim.Adagrad")
def adagrad_(
    params: Tensors, grads: Tensors, sums: Tensors, masters: Tensors, steps: Tensors, *, lr: Rate,
    lr_decay: float = 0.0, eps: float, weight_decay: float = 0.0, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "RMSprop", "Weight decay enters the gradient.",
    f"{_SQUARES}; 8 more with momentum", _RMSPROP, last_state_with="momentum")
def rmsprop_(
    params: Tensors, grads: Tensors, square_avgs: Tensors, momentum_buffers: Tensors, masters: Tensors,
    steps: Tensors, *, lr: Rate, alpha: float, eps: float, weight_decay: float = 0.0, momentum: float = 0.0,
    **shared: Unpack[Shared]) -> None: ...


@step_op(
    "centered RMSprop", "Divides by the root of ``square_avg - grad_avg^2``, or of 0 where roundings make it "
    "negative. Weight decay enters the gradient.",
    f"28 {_16} and masters, {_FOLLOW}; 8 more with momentum", _RMSPROP, last_state_with="momentum")
def rmsprop_centered_(
    params: Tensors, grads: Tensors, square_avgs: Tensors, grad_avgs: Tensors, momentum_buffers: Tensors,
    masters: Tensors, steps: Tensors, *, lr: Rate, alpha: float, eps: float, weight_decay: float = 0.0,
    momentum: float = 0.0, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "LAMB", "Adam's direction plus ``weight_decay * p``, times the trust ratio: the norm of the tensor's "
    "weights over that of the direction, at most ``trust_clip``; 1 where one of them is 0, and without "
    "``adapt``.", _NORMS, "arXiv:1904.00962, Alg. 2")
def lamb_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Tensors, masters: Tensors,
    steps: Tensors, *, lr: Rate, betas: Betas, eps: float, weight_decay: float, bias_correction: bool = True,
    trust_clip: float = math.inf, adapt: bool = True, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "LARS", "SGD with momentum on ``ratio * (g + weight_decay * p)``, where the ratio is "
    "``trust_coefficient * |p| / (|g| + weight_decay * |p| + eps)`` by the norms of the tensor; 1 where one "
    "of them is 0, and without ``adapt``.", _NORM, "arXiv:1708.03888, Alg. 1")
def lars_(
    params: Tensors, grads: Tensors, momentum_buffers: Tensors, masters: Tensors, steps: Tensors, *, lr: Rate,
    momentum: float, weight_decay: float, trust_coefficient: float, eps: float, nesterov: bool = False,
    adapt: bool = True, **shared: Unpack[Shared]) -> None: ...


@step_op(
    "NovoGrad", "The gradient, divided by the root of its tensor's second moment, plus ``weight_decay * p`` "
    "enters the first moment, with ``grad_averaging`` times ``1 - beta1``. exp_avg_sqs (one fp64 element per "
    "parameter) are the second moments; rewritten.", _NORM, "arXiv:1905.11286, Alg. 1")
def novograd_(
    params: Tensors, grads: Tensors, exp_avgs: Tensors, exp_avg_sqs: Scalars, masters: Tensors,
    steps: Tensors, *, lr: Rate, betas: Betas, eps: float, weight_decay: float, grad_averaging: bool = False,
    **shared: Unpack[Shared]) -> None: ...
