"""Step counts: FP32, 0-d, whole numbers from 0 to 2**62."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ... import _C
from ...tensors.addresses import read
from ...tensors.layout import is_fake
from ...tensors.shards import local

MOST_STEPS = 2**62  # far more than any run needs, and within int64


def as_step(value: Any, param: Tensor) -> Tensor:
    """Return a new step count for the ops: FP32, 0-d, on the parameter's device. No sync for numbers."""
    if not isinstance(value, Tensor):
        check_step(value)
        return torch.full((), float(value), dtype=torch.float32, device=param.device)
    if value.numel() != 1:
        raise ValueError(
            f"has a step count of shape {list(value.shape)}; expected one number. Assign a 0-d tensor."
        )
    check_step(value)
    return torch.as_tensor(value, dtype=torch.float32, device=param.device).detach().reshape(()).clone()


def check_step(value: Any) -> None:
    """Raise unless ``value`` is a valid step count; values on an accelerator are not checked (no sync)."""
    if isinstance(value, Tensor):
        if value.device.type != "cpu" or is_fake(value):
            return
        fields = read([value]) if value.dtype == torch.float32 else None
        if fields is not None and _C.are_counts(fields, 1):
            return
        value = local(value).item()
    if not isinstance(value, (int, float)) or not (0 <= value <= MOST_STEPS and math.floor(value) == value):
        raise ValueError(
            f"has step count {value!r}; expected a whole number from 0 to 2**62. Load an intact checkpoint, "
            "or assign the number of steps taken."
        )
