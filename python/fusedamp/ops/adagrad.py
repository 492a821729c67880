"""Steps that divide by a root of squared gradients, without a moment of the first kind."""

from typing import Unpack

from torch import Tensor

from .step import FOLLOW, Shared, Tensors, documented, need_momentum_buffers, run_step


@documented(
    title="Adagrad",
    formula="The rate of step t is ``lr / (1 + (t - 1) * lr_decay)``. Weight decay enters the gradient.",
    states="sums",
    cost=f"20 B/param with 16-bit weights and masters, {FOLLOW}",
    source="Duchi et al. 2011, JMLR 12, Fig. 1; torch.optim.Adagrad",
)
def adagrad_(
    params: Tensors,
    grads: Tensors,
    sums: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    lr_decay: float = 0.0,
    eps: float,
    weight_decay: float = 0.0,
    **shared: Unpack[Shared],
) -> None:
    hyper = dict(lr_decay=lr_decay, eps=eps, weight_decay=weight_decay)
    run_step("adagrad_", params, grads, masters, dict(sums=sums), steps, lr, hyper, shared)


_RMSPROP = dict(source="Tieleman & Hinton 2012, Lecture 6.5; torch.optim.RMSprop")


@documented(
    title="RMSprop",
    formula="Weight decay enters the gradient.",
    states="square_avgs, momentum_buffers (the last: empty without momentum)",
    cost=f"20 B/param with 16-bit weights and masters, {FOLLOW}; 8 more with momentum",
    **_RMSPROP,
)
def rmsprop_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    **shared: Unpack[Shared],
) -> None:
    need_momentum_buffers("rmsprop_", params, momentum_buffers, momentum)
    hyper = dict(alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    states = dict(square_avgs=square_avgs, momentum_buffers=momentum_buffers)
    run_step("rmsprop_", params, grads, masters, states, steps, lr, hyper, shared)


@documented(
    title="centered RMSprop",
    formula="Divides by the root of ``square_avg - grad_avg^2``, or of 0 where roundings make it negative. "
    "Weight decay enters the gradient.",
    states="square_avgs, grad_avgs, momentum_buffers (the last: empty without momentum)",
    cost=f"28 B/param with 16-bit weights and masters, {FOLLOW}; 8 more with momentum",
    **_RMSPROP,
)
def rmsprop_centered_(
    params: Tensors,
    grads: Tensors,
    square_avgs: Tensors,
    grad_avgs: Tensors,
    momentum_buffers: Tensors,
    masters: Tensors,
    steps: Tensors,
    *,
    lr: float | Tensor,
    alpha: float,
    eps: float,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    **shared: Unpack[Shared],
) -> None:
    need_momentum_buffers("rmsprop_centered_", params, momentum_buffers, momentum)
    hyper = dict(alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum)
    states = dict(square_avgs=square_avgs, grad_avgs=grad_avgs, momentum_buffers=momentum_buffers)
    run_step("rmsprop_centered_", params, grads, masters, states, steps, lr, hyper, shared)
