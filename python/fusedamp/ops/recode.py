"""The op that brings masters and states from one format into another; every tensor is dense, in any order of
dimensions, and the two formats have the same shape and strides. Each call reads and writes once, without
temporaries and without host sync.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..tensors.layout import memory_like
from .call import bump, call

SCALE_BLOCK = 128  # neighbors in memory that share a scale


def master_of(weight: Tensor, master: Tensor, made: Tensor | None = None) -> Tensor:
    """Make the FP32 master of a 16-bit weight from a split one, or from an FP32 one that follows the weight
    if that was modified (csrc/math/follow.h).

    Args:
        weight (fp16 or bf16), master (int16, the remainder of a split one, or fp32): read only.
        made (fp32): rewritten and returned; by default a new tensor.
    """
    made = memory_like(weight, torch.float32) if made is None else made
    _recode(master, made, weight, None)
    return made


def split_master_(weight: Tensor, master: Tensor, remainder: Tensor) -> None:
    """Make the remainder of a split master from an FP32 master, which first follows the weight.

    Args:
        weight (fp16 or bf16): rewritten; only ties that were rounded to even and the bits of NaNs change.
        master (fp32): read only.
        remainder (int16): rewritten.
    """
    _recode(master, remainder, weight, None)
    bump([weight, remainder])


def quantized(
    values: Tensor, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Floating-point values in 8 bits, to the nearest, and their block scales, on ``device``.

    Args:
        values (any floating-point dtype): read only.
        dtype: ``int8``, or ``uint8`` if no value is negative.
    Cost: values on another device are quantized before they move; to the CPU they move first.
    """
    device = values.device if device is None else device
    if device.type == "cpu":
        values = values.to(device)
    if values.dtype.itemsize < 2:  # FP8
        values = values.float()
    codes = memory_like(values, dtype)
    blocks = -(-values.numel() // SCALE_BLOCK)
    scales = torch.empty(blocks, dtype=torch.float32, device=values.device)
    _recode(values, codes, None, scales)
    return codes.to(device), scales.to(device)


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """Return the FP32 values of an 8-bit state (int8 or uint8; fp32 scales), with its strides."""
    values = memory_like(codes, torch.float32)
    _recode(codes, values, None, scales)
    return values


def zero_code(dtype: torch.dtype) -> int:
    """The 8-bit value that stands for 0 if the scale is 0; uint8 has no zero of its own."""
    return int(dtype == torch.uint8)


def _recode(source: Tensor, target: Tensor, weight: Tensor | None, scales: Tensor | None) -> None:
    if target.is_meta:
        torch.ops.fusedamp._recode_(source, target, weight, scales)
    else:
        call("_recode_", source, target, weight, scales)
