"""Checks of a parameter group's options."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import _C
from ...ops import checks
from ...tensors.layout import is_fake

# Storage options of masters and states: option -> its values, the most precise first.
STORAGE: dict[str, tuple[Any, ...]] = {
    "master_weights": ("fp32", "split", "none"),
    "state_dtype": ("float32", "bfloat16", "int8"),
}
LARGEST = torch.finfo(torch.float32).max  # steps compute with FP32: beyond it, 0 * lr would be NaN
MASTER_WEIGHTS = ("auto", *STORAGE["master_weights"])

# Default seeds, one per optimizer with stochastic rounding. torch's generators are not used: all ranks must
# draw the same numbers, but their generators often have different seeds.
seeds = itertools.count()


class SeenOptions:
    """Options of each group that were checked; identical objects need no second check.

    Groups with mutable options (tensors, lists) are always checked.
    """

    def __init__(self) -> None:
        self._seen: dict[int, list[Any]] = {}

    def has(self, index: int, group: dict[str, Any]) -> bool:
        return index in self._seen and _C.same_items([_options(group)], self._seen[index])

    def add(self, index: int, group: dict[str, Any]) -> None:
        options = _options(group)
        if all(map(_is_fixed, options)):
            self._seen[index] = options
        else:
            self._seen.pop(index, None)


def _options(group: dict[str, Any]) -> list[Any]:
    return [value for name, value in group.items() if name != "params"]


def _is_fixed(value: Any) -> bool:
    return (
        value is None
        or isinstance(value, (bool, int, float, str))
        or (isinstance(value, tuple) and all(map(_is_fixed, value)))
    )


class Bounds(NamedTuple):
    """Valid values of an option: numbers >= ``low`` and < ``below``; with ``length``, a tuple of them."""

    low: float = 0.0
    below: float = math.inf
    length: int | None = None

    def check(self, where: str, name: str, value: Any) -> None:
        """Raise unless ``value`` is valid; does not read tensors on an accelerator."""
        if self.length is not None:
            checks.need_length(where, name, value, self.length)
            for i, item in enumerate(value):
                self._replace(length=None).check(where, f"{name}[{i}]", item)
            return
        if isinstance(value, Tensor) and (value.device.type != "cpu" or is_fake(value)):
            checks.need_number(where, name, value)
            return
        number = checks.number(where, name, value, flags=True)
        if not (self.low <= number < self.below and abs(number) <= LARGEST):
            checks.refuse(where, name, value, self._wanted())

    def _wanted(self) -> str:
        if self.below < math.inf:
            return f"a number >= {self.low:g} and < {self.below:g}"
        least = "" if self.low == -math.inf else f" >= {self.low:g}"
        return f"a finite number{least}, at most 3.4e38 as in FP32"


NOT_NEGATIVE, FINITE = Bounds(), Bounds(low=-math.inf)
FRACTION, BETAS = Bounds(below=1.0), Bounds(below=1.0, length=2)


def check_common(where: str, group: dict[str, Any]) -> None:
    """Raise unless the options common to all optimizers are valid."""
    NOT_NEGATIVE.check(where, "lr", group["lr"])
    NOT_NEGATIVE.check(where, "weight_decay", group["weight_decay"])
    if group["master_weights"] not in MASTER_WEIGHTS:
        raise ValueError(
            f"{where} master_weights is {group['master_weights']!r}; expected one of {MASTER_WEIGHTS}. "
            'Use "auto" for FP32 masters of FP16 and BF16 parameters.'
        )
    _check_compression(where, group)
    if group.get("differentiable"):
        raise ValueError(
            f"{where} differentiable is True; expected False: the fused step has no derivative. "
            "Use the torch.optim optimizer of the same name to differentiate through steps."
        )


def draws(group: dict[str, Any]) -> bool:
    """True if steps of ``group`` draw random numbers."""
    return group["state_dtype"] != "float32" or bool(group["stochastic_rounding"])


def is_compressed(group: dict[str, Any]) -> bool:
    """True if masters or states have fewer bits than FP32, or weights are rounded stochastically."""
    return group["master_weights"] == "split" or draws(group)


def _check_compression(where: str, group: dict[str, Any]) -> None:
    if group["state_dtype"] not in STORAGE["state_dtype"]:
        raise ValueError(
            f"{where} state_dtype is {group['state_dtype']!r}; expected one of {STORAGE['state_dtype']}. "
            'Use "float32", which needs the most memory and adds no error.'
        )
    if not isinstance(group["stochastic_rounding"], bool):
        raise TypeError(
            f"{where} stochastic_rounding is {group['stochastic_rounding']!r}; expected True or False. It "
            "applies to 16-bit weights without masters; BF16 and 8-bit states always use it."
        )
    if group["stochastic_rounding"] and group["master_weights"] != "none":
        raise ValueError(
            f"{where} stochastic_rounding is True with master_weights {group['master_weights']!r}; expected "
            '"none", because a weight with a master is rounded to nearest. Pass master_weights="none".'
        )
    seed = group["rounding_seed"]
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**31):
        raise ValueError(
            f"{where} rounding_seed is {seed!r}; expected a whole number from 0 to 2**31 - 1, or None for "
            "one that is unique in this process. Pass one."
        )
