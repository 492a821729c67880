"""How far a result may lie from the exact one: counted roundings, never tuned numbers.

A rounding has a relative error of at most u = eps / 2. A step makes two of the size of the weight (the decay,
and the subtraction of the update) and up to ``k`` of the size of the update's terms before they cancel. The
recurrences contract, so that what earlier steps left does not grow: errors add up.
"""

import math
from typing import Any

import torch
from torch import Tensor


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
