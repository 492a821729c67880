"""Checks of GradScaler's arguments."""

from __future__ import annotations

import math
from functools import partial
from typing import Any, Literal, TypedDict

import torch
from torch import Tensor

from ..ops import checks
from .flags import has_value

# The smallest normal FP32 number. Its reciprocal is finite; from 2**-128 on it would be inf.
MIN_SCALE = 2.0**-126
FP32_MAX = torch.finfo(torch.float32).max


class ScaleLimits(TypedDict, total=False):
    """Arguments of fusedamp.GradScaler that torch's does not have; documented there."""

    min_scale: float
    max_scale: float
    hysteresis: int
    hysteresis_refill: Literal["growth", "good_step"]
    on_floor: Literal["warn", "raise"]
    process_group: Any
    policy: Literal["overflow", "headroom"]
    headroom_bits: int


number = partial(checks.number, "[GradScaler]")
_count = partial(checks.count, "[GradScaler]")
_refuse = partial(checks.refuse, "[GradScaler]")


def need_group(op: str, value: Any) -> None:
    """Raise if ``value`` is neither None nor a process group of this rank."""
    if value is None:
        return
    if not (torch.distributed.is_available() and isinstance(value, torch.distributed.ProcessGroup)):
        raise TypeError(
            f"[{op}] process_group is {value!r}; expected a torch.distributed.ProcessGroup that has this "
            "rank, as new_group() or DeviceMesh.get_group() return it on its members, or None."
        )


def check_device(value: Any) -> None:
    """Raise if fusedamp has no kernels for a device."""
    try:
        kind = torch.device(value).type
    except (RuntimeError, TypeError):
        kind = None
    if kind not in ("cpu", "cuda"):
        raise ValueError(
            f'[GradScaler] device is {value!r}; expected "cuda" or "cpu", which have kernels. Use '
            "torch.amp.GradScaler there, or enabled=False."
        )


def check_scale(name: str, value: Any) -> float:
    scale = number(name, value)
    if not 0 < scale <= FP32_MAX:
        _refuse(name, value, f"a finite number > 0 and at most {FP32_MAX:.8g} as in FP32, such as 2.0**16")
    return scale


def check_growth_factor(value: Any) -> float:
    factor = number("growth_factor", value)
    if not 1 <= factor < math.inf:
        _refuse("growth_factor", value, "a finite number >= 1, such as 2.0")
    return factor


def check_backoff_factor(value: Any) -> float:
    factor = number("backoff_factor", value)
    if not 0 < factor <= 1:
        _refuse("backoff_factor", value, "a number > 0 and <= 1, such as 0.5")
    return factor


def check_interval(value: Any) -> int:
    return _count("growth_interval", value, "the number of consecutive good steps that raise the scale")


def check_limits(
    min_scale: Any, max_scale: Any, hysteresis: Any, hysteresis_refill: Any, on_floor: Any
) -> tuple[float, float, int]:
    """Check the limits; returns ``min_scale``, ``max_scale`` and ``hysteresis`` as plain numbers."""
    low, high = number("min_scale", min_scale), number("max_scale", max_scale)
    if not MIN_SCALE <= low <= FP32_MAX:
        wanted = (
            f"a finite number >= 2**-126 (the default), which keeps 1/scale finite, and <= {FP32_MAX:.8g}"
        )
        _refuse("min_scale", min_scale, wanted)
    if not (low <= high <= FP32_MAX or high == math.inf):
        wanted = f"a number >= min_scale ({low!r}) and <= {FP32_MAX:.8g}, or inf for no ceiling"
        _refuse("max_scale", max_scale, wanted)
    budget = _count("hysteresis", hysteresis, "overflows until the scale is lowered; 1 as in torch")
    if hysteresis_refill not in ("growth", "good_step"):
        _refuse("hysteresis_refill", hysteresis_refill, '"growth" or "good_step"')
    if on_floor not in ("warn", "raise"):
        _refuse("on_floor", on_floor, '"warn" or "raise"')
    return low, high, budget


def check_policy(
    policy: Any, headroom_bits: Any, min_scale: float, max_scale: float, hysteresis: int, refill: str
) -> int | None:
    """Return the bits of the policy "headroom", or None for the other one."""
    bits = _count("headroom_bits", headroom_bits, "bits between the largest gradients and 2**16", 0, 14)
    if policy == "overflow":
        if bits != 2:
            _refuse("headroom_bits", headroom_bits, 'policy="headroom" with it')
        return None
    if policy != "headroom":
        _refuse("policy", policy, '"overflow" or "headroom"')
    if hysteresis != 1 or refill != "growth":
        name, value = ("hysteresis", hysteresis) if hysteresis != 1 else ("hysteresis_refill", refill)
        _refuse(name, value, 'the default with policy="headroom", which has its own reaction to overflows')
    if 2.0 ** math.ceil(math.log2(min_scale)) > min(max_scale, 2.0**127):
        wanted = f'a power of two from min_scale ({min_scale!r}) to it, with policy="headroom"'
        _refuse("max_scale", max_scale, wanted)
    return bits


def need_unused_factors(growth_factor: float, backoff_factor: float) -> None:
    """Raise unless the factors are the defaults: the policy "headroom" does not use them."""
    for name, value, default in (("growth", growth_factor, 2.0), ("backoff", backoff_factor, 0.5)):
        if value != default:
            wanted = f'{default} with policy="headroom", which moves the scale by whole bits'
            _refuse(f"{name}_factor", value, wanted)


def check_init_scale(init_scale: Any, min_scale: float, max_scale: float) -> float:
    scale = check_scale("init_scale", init_scale)
    if not min_scale <= scale <= max_scale:
        _refuse(
            "init_scale", init_scale, f"a number from min_scale ({min_scale!r}) to max_scale ({max_scale!r})"
        )
    return scale


def new_scale_value(new_scale: Any, device_type: str) -> float | Tensor:
    """Check the argument of ``update`` as torch does; returns a float or the tensor. A tensor's value is
    checked only on the CPU (no sync).
    """
    if not isinstance(new_scale, Tensor):
        return check_scale("new_scale", new_scale)
    if new_scale.device.type != device_type or new_scale.numel() != 1 or new_scale.requires_grad:
        raise AssertionError(
            "new_scale should be a float or a 1-element torch.cuda.FloatTensor or "
            "torch.FloatTensor with requires_grad=False."
        )
    if device_type == "cpu" and has_value(new_scale):
        check_scale("new_scale", new_scale)
    return new_scale.reshape(())


def checked_state(state: dict[str, Any], min_scale: float, max_scale: float) -> dict[str, Any]:
    """Check a scaler's ``state_dict()``; returns plain numbers within the limits of their dtypes and the
    scaler's bounds."""
    scale = number("state_dict['scale']", state["scale"])
    if scale != 0:  # torch's scaler can reach 0
        scale = check_scale("state_dict['scale']", scale)
    checked = {
        **state,
        "scale": min(max(scale, min_scale), max_scale),
        "growth_factor": check_growth_factor(state["growth_factor"]),
        "backoff_factor": check_backoff_factor(state["backoff_factor"]),
        "growth_interval": check_interval(state["growth_interval"]),
    }
    # The count must not overflow at the next good step.
    trackers = {"_growth_tracker": "good steps in a row", "_hysteresis_tracker": "overflows left to forgive"}
    for name, wanted in trackers.items():
        if name == "_growth_tracker" or state.get(name) is not None:
            checked[name] = _count(f"state_dict[{name!r}]", state[name], wanted, 0, checks.INT32_MAX - 1)
    return checked
