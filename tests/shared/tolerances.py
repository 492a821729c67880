"""How far a result may lie from the exact one: counted roundings, never tuned numbers.

A rounding has a relative error of at most u = eps / 2. A step makes two of the size of the weight (the decay,
and the subtraction of the update) and up to ``k`` of the size of the update's terms before they cancel. The
recurrences contract, so that what earlier steps left does not grow: errors add up.
"""

import math
from typing import Any

import torch
from torch import Tensor

LONGEST_SUM = 33 * 31  # elements of the largest tensor in the cases: as many roundings has a sum at most


def unit(dtype: torch.dtype) -> float:
    """The largest relative error of one rounding."""
    return torch.finfo(dtype).eps / 2


def adam_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The update before cancellation: ``largest``, the largest |g| + decay so far, over the exact
    denominator.
    """
    beta2 = options.get("betas", (0.9, 0.999))[1]
    v = state.get("max_exp_avg_sq", state["exp_avg_sq"])
    return largest / (v.sqrt() / math.sqrt(1 - beta2 ** state["step"]) + options.get("eps", 1e-8))


def sgd_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The update before cancellation: the geometric series of the buffer, and Nesterov's look-ahead."""
    momentum = options.get("momentum", 0.0)
    return largest * (1 + momentum) / (1 - momentum)


def lion_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The update: a sign."""
    return torch.ones_like(largest)


def adagrad_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The quotient before cancellation in the gradient."""
    return largest / (state["sum"].sqrt() + options.get("eps", 1e-10))


def rmsprop_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """As Adagrad's; the variance as exact as the square that it is the rest of. The buffer sums up what its
    terms and its own two roundings a step are off; 16 in all without it.
    """
    variance = state["variance"]
    quotient = largest / (variance.sqrt() + options.get("eps", 1e-8))
    if options.get("centered"):
        quotient = quotient * state["square_avg"] / variance
    return _summed_up(quotient, options.get("momentum", 0.0), state)


def _summed_up(term: Tensor, momentum: float, state: dict[str, Any]) -> Tensor:
    """How far a sum of such terms, each 14 roundings off, is off itself, in units of 16 roundings."""
    state["_size"] = momentum * state.get("_size", 0.0) + term
    state["_off"] = momentum * state.get("_off", 0.0) + 14 * term + 2 * state["_size"]
    return state["_off"] / 16


def radam_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """As Adam's, with the reference's own rate."""
    return largest * state["rate"]


def adafactor_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The update, with the reference's own rate."""
    return largest * state["rate"] / options["lr"]


NS_SLOPE = 3.9  # the polynomial's derivative is no steeper where singular values lie, from 0 to 1.2
NS_STEPS = 5


def muon_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Of a matrix: what each iteration adds to an error of one rounding of the gradients' size, and of the
    iteration's own products; else AdamW's.
    """
    if largest.dim() != 2:
        return adam_terms(largest, state, {"betas": (0.9, 0.95)})
    if not largest.numel():
        return largest
    before = largest.square().sum().sqrt() / state["length"] * NS_SLOPE**NS_STEPS
    # A product sums min(shape) terms; entries that lie in a matrix of norm 1.2 have a Frobenius norm below
    # 1.2 sqrt(rank). 3 products an iteration; 16 roundings are counted by the case.
    rank = min(largest.shape)
    own = 3 * rank * 1.2 * math.sqrt(rank) * sum(NS_SLOPE**i for i in range(NS_STEPS)) / 16
    return torch.full_like(largest, state["ratio"]) * (before + own)


def shaped_like(bound: Tensor, state: Tensor) -> Tensor:
    """The largest of ``bound`` over the dimensions along which a state is a mean."""
    for dim, (size, kept) in enumerate(zip(bound.shape, state.shape, strict=True)):
        if size != kept:
            bound = bound.amax(dim, keepdim=True) if bound.numel() else bound.new_zeros(state.shape)
    return bound


def nadam_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """As Adam's, for both parts of the update."""
    return adam_terms(largest, state, options) * state["parts"]


def lamb_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """The direction before cancellation, and what its norm, of all such errors, brings into the ratio."""
    terms = largest / state["denominator"] + largest
    return state["ratio"] * (terms + state["u"].abs() * terms.norm() / state["u"].norm())


def lars_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """What the buffer sums up; Nesterov's look-ahead takes it once more."""
    momentum = options.get("momentum", 0.9)
    return (1 + momentum) * _summed_up(state["ratio"] * largest, momentum, state)


def novograd_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """What the first moment sums up."""
    return _summed_up(state["size"], options.get("betas", (0.95, 0.98))[0], state)


def state_error(
    name: str, largest: Tensor, weight_error: Tensor, state: dict[str, Any], options: dict[str, Any]
) -> Tensor:
    """How far a state may be off, in roundings: five a step of the size of its terms, and what the weight's
    error, ``weight_error``, brings in by its decay.
    """
    steps, decay = state["step"], options["weight_decay"]
    if name == "sum":  # which grows: each of its own roundings is of the size of all that came before
        return 2 * largest * (5 * steps * largest + decay * weight_error) + steps * state["sum"]
    if name == "mu_product" or (name == "exp_avg_sq" and "size" in state):  # of whole tensors, in FP64
        return 8 * steps * state[name]
    if name in ("momentum_buffer", "exp_avg") and "_off" in state:  # of quotients
        return state["_off"] * (1 + decay * weight_error / largest)
    if name in ("row_var", "col_var", "variance"):  # means of squares, of the gradient alone
        return shaped_like(2 * largest * (5 * steps + LONGEST_SUM) * largest, state[name])
    growth = 1 if "_off" in state else 1 / (1 - options.get("momentum", 0.0))
    term = growth * (5 * steps * largest + decay * weight_error)
    return 2 * largest * term if name.endswith("_sq") or name == "square_avg" else term
