"""The checks of what a GradScaler is given."""

from __future__ import annotations

import math
from typing import Any, Literal, NoReturn, TypedDict

from torch import Tensor

# The smallest normal FP32 number. Its reciprocal is finite; from 2**-128 on it would be inf.
MIN_SCALE = 2.0**-126


class ScaleLimits(TypedDict, total=False):
    """What fusedamp.GradScaler takes beyond torch's arguments; explained there."""

    min_scale: float
    max_scale: float
    hysteresis: int
    hysteresis_refill: Literal["growth", "good_step"]
    on_floor: Literal["warn", "raise"]


def _refuse(name: str, got: object, wanted: str) -> NoReturn:
    raise ValueError(f"[GradScaler] {name} is {got!r}; expected {wanted}.")


def number(name: str, value: Any) -> float:
    try:
        if not isinstance(value, (str, bytes)):
            return float(value)
    except (TypeError, ValueError):
        pass
    raise TypeError(f"[GradScaler] {name} is {value!r}; expected a number.")


def count(name: str, value: Any, wanted: str) -> int:
    if not number(name, value).is_integer() or value < 1:
        _refuse(name, value, wanted)
    return int(value)


def check_scale(name: str, value: Any) -> float:
    scale = number(name, value)
    if not 0 < scale < math.inf:
        _refuse(name, value, "a finite number > 0, such as 2.0**16")
    return scale


def check_factors(growth_factor: Any, backoff_factor: Any) -> None:
    if not 1 <= number("growth_factor", growth_factor) < math.inf:
        _refuse("growth_factor", growth_factor, "a finite number >= 1, such as 2.0")
    if not 0 < number("backoff_factor", backoff_factor) <= 1:
        _refuse("backoff_factor", backoff_factor, "a number > 0 and <= 1, such as 0.5")


def check_interval(value: Any) -> int:
    return count(
        "growth_interval", value, "a whole number >= 1: how many good steps in a row raise the scale"
    )


def check_limits(
    min_scale: Any, max_scale: Any, hysteresis: Any, hysteresis_refill: Any, on_floor: Any
) -> None:
    if not MIN_SCALE <= number("min_scale", min_scale) < math.inf:
        _refuse(
            "min_scale", min_scale, "a finite number >= 2**-126 (the default), which keeps 1/scale finite"
        )
    if not number("max_scale", max_scale) >= min_scale:
        _refuse("max_scale", max_scale, f"a number >= min_scale ({min_scale!r}), or inf for no ceiling")
    count(
        "hysteresis",
        hysteresis,
        "a whole number >= 1: how many overflows lower the scale once; 1 is torch's way",
    )
    if hysteresis_refill not in ("growth", "good_step"):
        _refuse("hysteresis_refill", hysteresis_refill, '"growth" or "good_step"')
    if on_floor not in ("warn", "raise"):
        _refuse("on_floor", on_floor, '"warn" or "raise"')


def check_init_scale(init_scale: Any, min_scale: float, max_scale: float) -> None:
    if not min_scale <= check_scale("init_scale", init_scale) <= max_scale:
        _refuse(
            "init_scale", init_scale, f"a number from min_scale ({min_scale!r}) to max_scale ({max_scale!r})"
        )


def new_scale_value(new_scale: Any, device_type: str) -> float | Tensor:
    """What ``update(new_scale)`` was given, checked as torch does; a tensor's value is not looked at (no
    sync).
    """
    if isinstance(new_scale, Tensor):
        if new_scale.device.type != device_type or new_scale.numel() != 1 or new_scale.requires_grad:
            raise AssertionError(
                "new_scale should be a float or a 1-element torch.cuda.FloatTensor or "
                "torch.FloatTensor with requires_grad=False."
            )
        return new_scale.reshape(())
    return check_scale("new_scale", new_scale)
