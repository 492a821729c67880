"""The 64 bins of a gradient histogram, and FP16's limits in them.

An element s counts as it is stored, still multiplied by the loss scale. Bin 0 holds s = ±0, bin 1 0 < |s| <
2^-40, bin e + 42 2^e <= |s| < 2^(e + 1) for e in -40..19, bin 62 finite |s| >= 2^20, bin 63 inf and NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

BINS = 64
LOWEST, HIGHEST = -40, 20  # exponents: the lower edges of bins 2 and 62
ZERO, TINY, HUGE, NOT_FINITE = 0, 1, 62, 63

# FP16
LARGEST = 65504.0
CEILING = 16  # elements from 2^16 (65520, as rounded) are inf
NORMAL = -14  # the least normal number is 2^-14
FLOOR = -24  # the least number is 2^-24


def bin_of(exponent: int) -> int:
    """Return the bin of ``2.0**exponent``, for an exponent in -40..20."""
    return exponent - LOWEST + TINY + 1


def bin_edges() -> Tensor:
    """Return the lower edges of the histogram's bins, FP64 ``[64]`` on the CPU: 0, 0, 2^-40, ... 2^20, inf.

    Edges are those of gradients as stored. Divide by the loss scale for those of unscaled gradients.
    """
    powers = torch.arange(LOWEST, HIGHEST + 1, dtype=torch.float64, device="cpu").exp2()
    edges = torch.zeros(BINS, dtype=torch.float64, device="cpu")
    edges[TINY + 1 : NOT_FINITE] = powers
    edges[NOT_FINITE] = torch.inf
    return edges
