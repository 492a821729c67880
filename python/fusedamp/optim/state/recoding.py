"""Split masters and 8-bit states to and from FP32, for checkpoints that were saved in another form.

The formulas are those of csrc/math/split.h and quantize.h, which say what they mean. Steps don't come here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors.layout import memory_like

SCALE_BLOCK = 128  # neighbours in memory that share a scale
PIECE = 2**16  # elements that are recoded at once: temporaries stay small beside large tensors; whole blocks


def joined(param: Tensor, remainder: Tensor) -> Tensor:
    """The FP32 master of a split one: see csrc/math/split.h."""
    weight = param.float()
    if param.dtype == torch.bfloat16:
        master = (weight.view(torch.int32) + remainder.int()).view(torch.float32)
    else:
        master = weight + remainder.float() * _half_unit(weight)
    rounded = rounded_away(master) if param.dtype == torch.bfloat16 else master.to(param.dtype)
    return torch.where(
        rounded.view(torch.int16) == param.view(torch.int16), master, weight
    )  # -0.0 is not 0.0


def followed(master: Tensor, weight: Tensor) -> Tensor:
    """The FP32 master beside a 16-bit weight that may have been modified: see csrc/math/follow.h."""
    rounded, wide = master.to(weight.dtype), weight.float()
    if weight.dtype == torch.bfloat16:
        remainder = master.view(torch.int32) - rounded.float().view(torch.int32)
        moved = (wide.view(torch.int32) + remainder.masked_fill(master.isnan(), 0)).view(torch.float32)
    else:
        was = rounded.float()
        moved = wide + (master - was) * (_half_unit(wide) / _half_unit(was))
    fits = moved.to(weight.dtype).view(torch.int16) == weight.view(torch.int16)
    return torch.where(fits, moved, wide)


def split(master: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """An FP32 master as a 16-bit weight and an int16 remainder."""
    if dtype == torch.bfloat16:
        bits = master.view(torch.int32)
        return rounded_away(master), torch.where(master.isnan(), 0, bits).to(torch.int16)
    weight = master.to(dtype)
    unit = _half_unit(weight.float())
    most = 16384 - (weight.float() / (unit * 2**15)).remainder(2)  # ties belong to the even neighbour
    units = ((master - weight.float()) / unit).round().clamp(-most, most)
    return weight, torch.where(weight.isfinite(), units, 0.0).to(torch.int16)


def rounded_away(master: Tensor) -> Tensor:
    """FP32 to BF16, to nearest with ties away from zero."""
    bits = master.view(torch.int32)
    upper = ((bits + 0x8000) >> 16).to(torch.int16).view(torch.bfloat16)
    return torch.where(master.isnan(), torch.nan, upper)


def _half_unit(weight: Tensor) -> Tensor:
    exponent = (weight.view(torch.int32) & 0x7F800000).clamp_(min=0x38800000)
    return (exponent - (25 << 23)).view(torch.float32)


def dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    """The FP32 values of an 8-bit state, in its layout."""
    values = torch.empty_like(codes, dtype=torch.float32)
    flat, to = _flat(codes), _flat(values)
    for first in range(0, flat.numel(), PIECE):
        piece = slice(first, first + PIECE)
        to[piece] = _dequantized(flat[piece], scales[first // SCALE_BLOCK :])
    return values


def _dequantized(codes: Tensor, scales: Tensor) -> Tensor:
    nonnegative = codes.dtype == torch.uint8
    flat = codes.float()
    magnitude = flat.abs()
    tapered = ((magnitude.view(torch.int32) - _bias(nonnegative)) << 2).view(torch.float32)
    x = torch.where(magnitude < 4, magnitude * 2.0 ** (-25 if nonnegative else -21), tapered)
    blocks = -(-flat.numel() // SCALE_BLOCK)
    return x.copysign(flat) * scales[:blocks].repeat_interleave(SCALE_BLOCK)[: x.numel()]


def quantized(
    values: Tensor, dtype: torch.dtype, device: torch.device | None = None
) -> tuple[Tensor, Tensor]:
    """Floating-point values as 8-bit ones, to the nearest, and their block scales, on ``device``.

    Cost: 33 bytes of temporaries for each of at most ``PIECE`` elements.
    """
    device = values.device if device is None else device
    codes = memory_like(values, dtype, device)
    flat, to = _flat(values), _flat(codes)
    scales = torch.empty(-(-flat.numel() // SCALE_BLOCK), dtype=torch.float32, device=device)
    for first in range(0, flat.numel(), PIECE):
        piece = flat[first : first + PIECE].to(device, torch.float32)
        to[first : first + PIECE], found = _quantized(piece, dtype)
        scales[first // SCALE_BLOCK :][: found.numel()] = found
    return codes, scales


def _quantized(flat: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    nonnegative = dtype == torch.uint8
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % SCALE_BLOCK)).view(-1, SCALE_BLOCK)
    largest = blocks.abs().amax(1)
    power = (largest.view(torch.int32) + (1 << (18 if nonnegative else 19))) & 0x7F800000
    scales = power.clamp(max=0x7E800000).view(torch.float32)
    # Not isfinite(): its scalar would be made on the host.
    poisoned = largest.view(torch.int32) >= 0x7F800000 + nonnegative
    scales = scales.masked_fill(poisoned, torch.nan)
    rows = scales.unsqueeze(1)
    x = torch.where(rows > 0, blocks.abs() / rows, 0.0)
    bits = x.view(torch.int32).clamp(max=0x3FFFFFFF)
    tapered = ((bits >> 2) + _bias(nonnegative)).view(torch.float32)
    y = torch.minimum(tapered, bits.view(torch.float32) * 2.0 ** (25 if nonnegative else 21))
    y = (y + 0.5).floor().clamp(int(nonnegative), 255 if nonnegative else 127).copysign(blocks)
    y = y.abs() if nonnegative else y
    return y.view(-1).narrow(0, 0, flat.numel()).to(dtype), scales


def zero_code(dtype: torch.dtype) -> int:
    """The 8-bit value that stands for 0 where the scale is 0."""
    return int(dtype == torch.uint8)


def _bias(nonnegative: bool) -> int:
    return 0x33800000 if nonnegative else 0x33000000


def _flat(dense: Tensor) -> Tensor:
    """The elements of a dense tensor in the order of its memory."""
    return dense.as_strided((dense.numel(),), (1,))
