"""Bounds of the difference from the exact result: counted roundings, never tuned numbers.

A rounding has a relative error of at most u = eps / 2. A step makes two of the size of the weight (the decay,
and the subtraction of the update) and up to ``k`` of the size of the update's terms before they cancel. The
recurrences contract, so that what earlier steps left does not grow: errors add up.
"""

from __future__ import annotations

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
    """Error of a sum of such terms, each with an error of 14 roundings, in units of 16 roundings."""
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
    """Sum in the buffer; Nesterov's look-ahead adds it once more."""
    momentum = options.get("momentum", 0.9)
    return (1 + momentum) * _summed_up(state["ratio"] * largest, momentum, state)


def novograd_terms(largest: Tensor, state: dict[str, Any], options: dict[str, Any]) -> Tensor:
    """Sum in the first moment."""
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


EXACT = 2.0**-53  # the unit roundoff of what is always FP64
SLACK = 1.01  # for the second order


class Rounded:
    """An FP64 tensor with a bound on the error of a computation in another precision, to first order.

    Functions of ``reference.py`` take it in place of a tensor. Each operation rounds once, by at most ``u``
    times its result; so does a number where it meets a tensor. The op adds terms in the same order, folds
    numbers into fewer coefficients and fuses products with sums: it rounds no more often. Norms and sums over
    a tensor, and what is made of them and of numbers, are FP64 until they meet a tensor. What is made of
    numbers alone is exact.
    """

    def __init__(self, value: Any, error: Any, u: float) -> None:
        self.value, self.error, self.u = value, error, u

    def _with(self, other: Any) -> tuple[Rounded, Rounded, float]:
        """Both at the same precision, and its unit roundoff."""
        other = other if isinstance(other, Rounded) else Rounded(other, 0.0, 0.0)
        u = max(self.u, other.u)
        one, two = (x if x.u == u else Rounded(x.value, x.error + u * abs(x.value), u) for x in (self, other))
        return one, two, u

    def __neg__(self) -> Rounded:
        return Rounded(-self.value, self.error, self.u)

    def abs(self) -> Rounded:
        return Rounded(self.value.abs(), self.error, self.u)

    def __add__(self, other: Any) -> Rounded:
        a, b, u = self._with(other)
        value = a.value + b.value
        return Rounded(value, a.error + b.error + u * abs(value), u)

    def __sub__(self, other: Any) -> Rounded:
        return self + -other

    def __rsub__(self, other: Any) -> Rounded:
        return -self + other

    def __mul__(self, other: Any) -> Rounded:
        a, b, u = self._with(other)
        value = a.value * b.value
        return Rounded(value, abs(a.value) * b.error + abs(b.value) * a.error + u * abs(value), u)

    def __truediv__(self, other: Any) -> Rounded:
        a, b, u = self._with(other)
        value = a.value / b.value
        return Rounded(value, (a.error + abs(value) * b.error) / abs(b.value) + u * abs(value), u)

    def __rtruediv__(self, other: Any) -> Rounded:
        return Rounded(other, 0.0, 0.0) / self

    __radd__, __rmul__ = __add__, __mul__

    def square(self) -> Rounded:
        return self * self

    def __pow__(self, exponent: int) -> Rounded:
        assert exponent == 2
        return self.square()

    def sqrt(self) -> Rounded:
        value = self.value.sqrt()
        return Rounded(value, self.error / (2 * value) + self.u * value, self.u)

    def sign(self) -> Rounded:
        """Either sign where roundings may turn it."""
        return Rounded(self.value.sign(), 2.0 * (self.value.abs() <= self.error), self.u)

    def maximum(self, other: Rounded) -> Rounded:
        return Rounded(self.value.maximum(other.value), torch.maximum(self.error, other.error), self.u)

    def sum(self) -> Rounded:
        """The many roundings of a long FP64 sum average out, to about one."""
        value = self.value.sum()
        return Rounded(value, self.error.sum() + EXACT * abs(value), EXACT)

    def norm(self) -> Rounded:
        """As the sum of squares; no further off than the norm of the errors."""
        value = self.value.norm()
        return Rounded(value, self.error.norm() + EXACT * value, EXACT)

    def __gt__(self, other: Any) -> bool:
        return bool(self.value > getattr(other, "value", other))

    def __lt__(self, other: Any) -> bool:
        return bool(self.value < getattr(other, "value", other))

    def check(self, got: Tensor, what: str) -> None:
        """Asserts that ``got`` lies within the bound; twice the bound if ``value`` rounds as coarsely."""
        miss = (got.double() - self.value).abs()
        allowed = self.error * (2 * SLACK if self.u <= EXACT else SLACK)
        worst = (miss - allowed).max().item() if miss.numel() else 0.0
        assert worst <= 0, (
            f"{what} misses the reference by {miss.max().item():.3g}, {worst:.3g} beyond its roundings"
        )
