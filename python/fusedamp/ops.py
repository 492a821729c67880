"""The ops, typed and documented: `torch.ops.fusedamp.*` with argument names, checks that raise ValueError or
TypeError, and version counters that autograd can trust.

Every tensor of a call lives on one device. Lists mix float16, bfloat16, float32 and float64 freely. Tensors
are dense in memory (no gaps or overlaps) in any order of dimensions; what belongs to a parameter has its
shape and strides. Empty and 0-dim tensors and views at any offset are fine, and so is an empty list: there
is nothing to do then. Nothing synchronises with the host, and a call that raises has changed nothing.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import _library, arguments, packed

__all__ = ["GradStats", "adam_", "adamw_", "grad_stats", "sgd_", "unscale_", "update_scale_"]


class GradStats(NamedTuple):
    """What one read pass over n gradients finds. All tensors are on the gradients' device."""

    found_inf: Tensor
    """float32, 0-dim: 1 if an element is not finite before or after unscaling, else 0."""
    total: Tensor
    """float64, 0-dim: the sum of |g * inv_scale|^p over all tensors (p = inf: the maximum; p = 0: how many
    are not 0)."""
    per_tensor: Tensor
    """float64, [n]: the same for each tensor."""
    counts: Tensor
    """int64, [n, 3]: elements that are infinite, that are NaN, and that are finite but overflow when
    unscaled."""


def unscale_(grads: Sequence[Tensor], inv_scale: Tensor, found_inf: Tensor) -> None:
    """Multiplies every gradient by ``inv_scale`` in place, and sets ``found_inf`` to 1 if anything is not
    finite.

    Args:
        grads (list of tensors, any shape, fp16|bf16|fp32|fp64): rewritten; arithmetic in fp32 (fp64 for
            fp64), rounded to nearest even.
        inv_scale (1 element, fp32): 1 / loss scale.
        found_inf (1 element, fp32): set to 1 if an element is not finite before, or after as it is stored;
            else untouched.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: reads and writes each gradient once; no host sync.  Source: arXiv:1710.03740, section 3.2.
    """
    arguments.need_lists("unscale_", grads=grads)
    if not grads:
        return
    _call("unscale_", grads, inv_scale, found_inf)
    _bump(grads, [found_inf])


def grad_stats(
    grads: Sequence[Tensor],
    inv_scale: Tensor | None = None,
    norm_type: float = 2.0,
    fields: packed.Fields | None = None,
) -> GradStats:
    """Finite check before and after unscaling, total and per-tensor norms and non-finite counts, in one read
    pass.

    The norm is ``total ** (1 / norm_type)`` (for inf: ``total``). The check is made in fp32 (fp64 for fp64
    gradients). Results are deterministic and do not depend on the number of threads or on the instruction
    set.

    Args:
        grads (list of tensors, any shape, fp16|bf16|fp32|fp64, at least one): read only.
        inv_scale (1 element, fp32): 1 / loss scale; None stands for 1.
        norm_type: the p of the norm, 0 to inf.
        fields: what ``packed.read(grads)`` returned just now, to spare reading them again.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: reads each gradient once; no host sync.
    """
    arguments.need_lists("grad_stats", grads=grads)
    if not grads:
        raise ValueError("[grad_stats] grads is empty; expected at least one tensor")
    norm_type = arguments.number("grad_stats", "norm_type", norm_type)
    if not norm_type >= 0.0:
        raise ValueError(f"[grad_stats] norm_type is {norm_type}; expected a number from 0 to inf")
    if fields is None:
        fields = packed.read(grads)
    if fields is not None:
        return GradStats(*_call("packed_grad_stats", packed.rows(fields), grads[0], inv_scale, norm_type))
    return GradStats(*_call("grad_stats", grads, inv_scale, norm_type))


def update_scale_(
    scale: Tensor,
    growth_tracker: Tensor,
    found_inf: Tensor,
    *,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float = 0.0,
    max_scale: float = float("inf"),
    hysteresis_tracker: Tensor | None = None,
    hysteresis: int = 1,
    refill_on_good_step: bool = False,
) -> None:
    """The loss scale of the next iteration, in place. With the defaults exactly ``torch._amp_update_scale_``.

    After an overflow (``found_inf`` is not 0) the scale is multiplied by ``backoff_factor``, but never
    brought below ``min_scale``; after ``growth_interval`` good iterations in a row it is multiplied by
    ``growth_factor``, but never brought above ``max_scale`` nor to infinity. With ``hysteresis`` h, the
    first h - 1 overflows are forgiven; the budget is refilled when the scale grows, or after any good
    iteration with ``refill_on_good_step``.

    Args:
        scale (1 element, fp32): rewritten.
        growth_tracker (1 element, int32): good iterations in a row; rewritten.
        found_inf (1 element, fp32): read only.
        hysteresis_tracker (1 element, int32): what is left of the budget, ``hysteresis`` at first; rewritten.
    Raises: ValueError naming the argument, what it got, what it wanted.
    Cost: one element; no host sync.  Source: arXiv:1710.03740, section 3.2.
    """
    op = "update_scale_"
    factors = dict(
        growth_factor=growth_factor, backoff_factor=backoff_factor, min_scale=min_scale, max_scale=max_scale
    )
    factors = {name: arguments.number(op, name, value) for name, value in factors.items()}
    for name, value in dict(growth_interval=growth_interval, hysteresis=hysteresis).items():
        if not isinstance(value, int) or (name == "hysteresis" and value < 1):
            raise ValueError(f"[{op}] {name} is {value!r}; expected a whole number from 1")
    if hysteresis > 1 and hysteresis_tracker is None:
        raise ValueError(
            f"[{op}] hysteresis is {hysteresis}; expected a hysteresis_tracker (int32, 1 element) with it"
        )
    _call(
        op,
        scale,
        growth_tracker,
        hysteresis_tracker,
        found_inf,
        growth_interval=growth_interval,
        hysteresis=hysteresis,
        refill_on_good_step=arguments.flag(op, "refill_on_good_step", refill_on_good_step),
        **factors,
    )
    _bump([scale, growth_tracker], [] if hysteresis_tracker is None else [hysteresis_tracker])


_STEP_DOC = """One in-place {title} step over lists of tensors; changes nothing where ``found_inf`` is not 0.

    Arithmetic in fp32 (fp64 for fp64 parameters). {formula}

    Args:
        params (list of tensors, any shape, fp16|bf16|fp32|fp64): rewritten; with masters, = round(master) to
            nearest even.
        grads (as ``params``, any of the dtypes; fp64 for fp64 params only): read only, still multiplied by
            the loss scale.
        {states} (as ``params``, fp32; fp64 for fp64 params): rewritten.
        masters (as ``params``, fp32; one per parameter, all of them fp16 or bf16; or empty): rewritten.
            Where a weight is not its master rounded, somebody wrote the weight, and the master follows it
            before the step.
        steps (list of 1-element fp32 tensors): how many steps each parameter has taken; incremented.
        lr (float, or 1 element fp32|fp64, on the CPU or on the same device): learning rate.
        inv_scale, clip_coef (1 element, fp32): the gradient enters as ``g * (inv_scale * clip_coef)``; None
            stands for 1.
        found_inf (1 element, fp32): not 0 means skip; None means no check.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: {cost}; no host sync.  Source: {source}.
    """


def _documented(**parts: str) -> Callable:
    def decorate(function: Callable) -> Callable:
        function.__doc__ = _STEP_DOC.format(**parts)
        return function

    return decorate


_FOLLOW = "and the 2 B that see whether the weight was written"
_ADAM = dict(
    states="exp_avgs, exp_avg_sqs, max_exp_avg_sqs (the last: empty without ``amsgrad``)",
    cost=f"28 B/param with 16-bit weights and masters, {_FOLLOW}; 28 B/param in fp32",
)


@_documented(
    title="AdamW",
    formula="Weight decay is decoupled: ``p -= lr * weight_decay * p``.",
    source="arXiv:1711.05101, Alg. 2; AMSGrad arXiv:1904.09237",
    **_ADAM,
)
def adamw_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    maximize: bool = False,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    states = _adam_states("adamw_", exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
    beta1, beta2 = arguments.pair("adamw_", "betas", betas)
    hyper = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    scalars = step_scalars("adamw_", params, lr, hyper, maximize, inv_scale, clip_coef, found_inf)
    step_lists("adamw_", params, grads, masters, states, steps, scalars)


@_documented(
    title="Adam",
    formula="Weight decay enters the gradient: ``g += weight_decay * p``.",
    source="arXiv:1412.6980, Alg. 1; AMSGrad arXiv:1904.09237",
    **_ADAM,
)
def adam_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    max_exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
    maximize: bool = False,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    states = _adam_states("adam_", exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad)
    beta1, beta2 = arguments.pair("adam_", "betas", betas)
    hyper = dict(beta1=beta1, beta2=beta2, eps=eps, weight_decay=weight_decay)
    scalars = step_scalars("adam_", params, lr, hyper, maximize, inv_scale, clip_coef, found_inf)
    step_lists("adam_", params, grads, masters, states, steps, scalars)


@_documented(
    title="SGD",
    formula="A parameter's first step puts the gradient into its momentum buffer undampened, as in torch.",
    states="momentum_buffers (empty without momentum)",
    cost=f"20 B/param with 16-bit weights, masters and momentum, {_FOLLOW}",
    source="Sutskever et al. 2013; torch.optim.SGD",
)
def sgd_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    momentum_buffers: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[Tensor],
    *,
    lr: float | Tensor,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
) -> None:
    arguments.need_lists("sgd_", params=params, momentum_buffers=momentum_buffers)
    if bool(momentum_buffers) != (arguments.number("sgd_", "momentum", momentum) != 0.0 and len(params) > 0):
        raise ValueError(
            f"[sgd_] momentum_buffers has {len(momentum_buffers)} tensors with momentum={momentum}; expected "
            "one per param with momentum, none without"
        )
    hyper = dict(momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov)
    scalars = step_scalars("sgd_", params, lr, hyper, maximize, inv_scale, clip_coef, found_inf)
    step_lists("sgd_", params, grads, masters, dict(momentum_buffers=momentum_buffers), steps, scalars)


def _adam_states(op, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, amsgrad) -> dict[str, Sequence[Tensor]]:
    states = dict(exp_avgs=exp_avgs, exp_avg_sqs=exp_avg_sqs, max_exp_avg_sqs=max_exp_avg_sqs)
    arguments.need_lists(op, **states)
    if arguments.flag(op, "amsgrad", amsgrad) != bool(max_exp_avg_sqs) and exp_avgs:
        raise ValueError(
            f"[{op}] max_exp_avg_sqs has {len(max_exp_avg_sqs)} tensors with amsgrad={amsgrad}; expected one "
            "per param with amsgrad, none without"
        )
    return states


def step_lists(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Sequence[Tensor],
    states: Mapping[str, Sequence[Tensor]],
    steps: Sequence[Tensor],
    scalars: dict[str, Any],
) -> None:
    """Any step op. ``states`` by the names that the caller knows; ``scalars`` from :func:`step_scalars`."""
    arguments.need_lists(op, params=params, grads=grads, masters=masters, steps=steps)
    lengths = dict(grads=grads, **states, masters=masters, steps=steps)
    for name, tensors in lengths.items():
        if len(tensors) != len(params) and (tensors or name in ("grads", "exp_avgs", "exp_avg_sqs", "steps")):
            raise ValueError(
                f"[{op}] {name} has {len(tensors)} tensors; expected {len(params)}, one per param"
                f"{', or none at all' if name == 'masters' else ''}"
            )
    if not params:
        return
    flat = [state for tensors in states.values() for state in tensors]
    try:
        _call(op, params, grads, masters, flat, steps, **scalars)
    except (TypeError, ValueError) as error:
        # The op has one list of states; the caller knows them by name.
        names = [f"{name}[{i}]" for name, tensors in states.items() for i in range(len(tensors))]
        text = re.sub(r"\bstates\[(\d+)\]", lambda match: names[int(match[1])], str(error))
        raise type(error)(text) from None
    _bump(params, masters, flat, steps)


def step_scalars(
    op: str,
    params: Sequence[Tensor],
    lr: float | Tensor,
    hyper: dict[str, Any],
    maximize: bool,
    inv_scale: Tensor | None,
    clip_coef: Tensor | None,
    found_inf: Tensor | None,
) -> dict[str, Any]:
    """The keyword arguments that every step op has. ``hyper``: by name, in the order of csrc/math's Hyper."""
    arguments.need_lists(op, params=params)
    lr_tensor = None
    if isinstance(lr, Tensor) and params and isinstance(params[0], Tensor):
        if lr.device == params[0].device or lr.device.type != "cpu" or lr.numel() != 1:
            lr, lr_tensor = 0.0, lr
        else:
            lr = lr.item()  # reading a CPU tensor waits for nothing
    return dict(
        lr=arguments.number(op, "lr", lr),
        hyper=[arguments.number(op, name, value) for name, value in hyper.items()],
        maximize=arguments.flag(op, "maximize", maximize),
        lr_tensor=lr_tensor,
        inv_scale=inv_scale,
        clip_coef=clip_coef,
        found_inf=found_inf,
    )


def _call(op: str, *args: Any, **kwargs: Any) -> Any:
    """Calls the op. Its own complaints ("[op_] params[3] is ...") become ValueErrors without C++ line
    numbers."""
    first = args[0][0] if isinstance(args[0], (list, tuple)) and args[0] else args[0]
    if isinstance(first, Tensor) and first.is_meta:
        arguments.explain(op, RuntimeError(), args, kwargs, "")
    try:
        return getattr(torch.ops.fusedamp, op)(*args, **kwargs)
    except RuntimeError as error:
        complaint = re.search(r"\[\w+_?\] .+", str(error))
        if complaint is None:
            arguments.explain(op, error, args, kwargs, "yes" if _library.HAS_CUDA_OPS else "no")
        raise ValueError(complaint.group()) from None


def _bump(*lists: Sequence[Tensor]) -> None:
    """A custom op does not move the version counters of what it wrote; autograd must notice all the same."""
    for tensors in lists:
        if len(tensors):
            torch.autograd.graph.increment_version(tensors)
