"""Reference of 8-bit states in float64, written independently of the engine."""

import numpy as np
import torch
from torch import Tensor

BLOCK = 128


def values_of_codes(nonnegative: bool) -> np.ndarray:
    """Values of the quantized values 0 ... 127 or 255, relative to the block's scale."""
    per_octave = 32 if nonnegative else 16
    values: list[float] = []
    for octave in range(24 if nonnegative else 20):  # downwards from [1, 2)
        density = per_octave >> octave // 4
        values = [2.0**-octave * (1 + i / density) for i in range(density)] + values
    return np.array([values[0] * code / 4 for code in range(4)] + values)


def scale_of(block: np.ndarray, nonnegative: bool) -> float:
    """The power of two that a block is relative to: its largest value is below 2, with room to round."""
    largest = float(np.abs(block).max(initial=0.0))
    if largest < 2.0**-126:
        return 0.0
    power = 2.0 ** np.floor(np.log2(largest))
    room = 1 / (32 if nonnegative else 16)
    return power if largest / power < 2 - room else 2 * power


def neighbors(x: np.ndarray, nonnegative: bool) -> tuple[np.ndarray, np.ndarray]:
    """The grid values on both sides of each x >= 0, which is relative to the scale."""
    values = values_of_codes(nonnegative)
    lowest = 1 if nonnegative else 0
    upper = np.clip(np.searchsorted(values, x, side="right"), lowest + 1, len(values) - 1)
    return values[upper - 1], values[upper]


def decoded(codes: Tensor, scales: Tensor) -> Tensor:
    """FP64 values of an 8-bit state."""
    values = torch.from_numpy(values_of_codes(codes.dtype == torch.uint8)).to(codes.device)
    flat = codes.flatten().long()
    magnitudes = values[flat.abs()] * torch.where(flat < 0, -1.0, 1.0)
    return magnitudes * scales.double().repeat_interleave(BLOCK)[: flat.numel()]


def are_neighbors(codes: Tensor, scales: Tensor, wanted: Tensor) -> bool:
    """True if each quantized value is one of the two nearest to its value, and each scale is correct."""
    nonnegative = codes.dtype == torch.uint8
    values, found = wanted.flatten().double().cpu().numpy(), decoded(codes, scales).cpu().numpy()
    for b, scale in zip(range(0, values.size, BLOCK), scales.tolist(), strict=True):
        block, stored = values[b : b + BLOCK], found[b : b + BLOCK]
        if scale != scale_of(block, nonnegative):
            return False
        if scale == 0.0:
            if (stored != 0.0).any():
                return False
            continue
        below, above = neighbors(np.abs(block) / scale, nonnegative)
        magnitude = np.abs(stored) / scale
        if not ((magnitude == below) | (magnitude == above)).all() or (stored * block < 0).any():
            return False
    return True


def followed(masters: Tensor, weights: Tensor) -> Tensor:
    """FP32 masters after 16-bit weights may have been modified: the remainder is kept if it fits.

    BF16 by whole numbers, FP16 in float64.
    """
    home, masters = masters.device, masters.cpu().numpy()
    wide = weights.float().cpu().numpy()
    if weights.dtype == torch.bfloat16:
        bits, new = masters.view(np.uint32).astype(np.int64), wide.view(np.uint32).astype(np.int64)
        rounded = torch.from_numpy(masters).bfloat16().float().numpy().view(np.uint32).astype(np.int64)
        moved = (new + bits - rounded).astype(np.uint32).view(np.float32)
    else:
        with np.errstate(over="ignore"):
            rounded = masters.astype(np.float16).astype(np.float64)

        def unit(x: np.ndarray) -> np.ndarray:
            _, exponent = np.frexp(np.where(np.isfinite(x), x, 1.0))
            return 2.0 ** np.maximum(np.where(x == 0, -13, exponent), -13)

        with np.errstate(invalid="ignore"):
            moved = wide + (masters - rounded) * unit(wide.astype(np.float64)) / unit(rounded)
        moved = moved.astype(np.float32)
    moved = torch.from_numpy(np.asarray(moved))
    back = moved.to(weights.dtype).view(torch.int16)
    fits = (back == weights.cpu().view(torch.int16)) & ~torch.from_numpy(masters).isnan()
    kept = torch.where(fits, moved, weights.cpu().float())
    # A master that rounds to its weight stays, also one of 65520 or more beside an infinite FP16 weight.
    before = torch.from_numpy(masters)
    same = before.to(weights.dtype).view(torch.int16) == weights.cpu().view(torch.int16)
    return torch.where(same & ~before.isnan(), before, kept).to(home)


def rounded_away(masters: Tensor) -> Tensor:
    """FP32 as BF16, to nearest with ties away from zero; no NaN."""
    bits = masters.cpu().numpy().view(np.uint32).astype(np.int64)
    upper = np.asarray(bits + 0x8000 >> 16).astype(np.uint16).view(np.int16)
    return torch.from_numpy(np.asarray(upper)).view(torch.bfloat16).to(masters.device)
