"""Linear layers in float64, with bounds of what 16-bit products with FP32 sums may miss: counted roundings.

A sum of n products in FP32, in any order, misses at most (n + 2) 2^-24 times the sum of their sizes to first
order; twice that is allowed. A result that is stored in 16 bits is rounded once more: half a unit in its last
place.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

U32 = 2.0**-24
TINY = {
    torch.float16: 2.0**-25,
    torch.bfloat16: 2.0**-134,
    torch.float32: 2.0**-150,
}  # half the last subnormal


@dataclass
class Exact:
    """A value in float64, and the most that a computed one may differ from it."""

    value: Tensor
    bound: Tensor

    def check(self, got: Tensor, what: str) -> None:
        assert got.shape == self.value.shape, f"{what} has shape {list(got.shape)}"
        stored = self.value.abs() + self.bound
        allowed = self.bound + stored * torch.finfo(got.dtype).eps / 2 + TINY[got.dtype]
        miss = (got.double() - self.value).abs()
        worst = (miss - allowed).max().item() if miss.numel() else 0.0
        assert worst <= 0, f"{what} misses the reference by {miss.max().item():.3g}, {worst:.3g} too much"


def product(a: Tensor, b: Tensor, added: Tensor | None = None) -> Exact:
    """a b + added, of matrices."""
    a, b = a.double(), b.double()
    value, size = a @ b, a.abs() @ b.abs()
    if added is not None:
        value, size = value + added.double(), size + added.double().abs()
    return Exact(value, 2 * (a.shape[1] + 2) * U32 * size)


def row_sums(t: Tensor) -> Exact:
    t = t.double()
    return Exact(t.sum(0), 2 * (t.shape[0] + 2) * U32 * t.abs().sum(0))


GELU_SLOPE, GELU_BEND = 1.13, 1.1  # bounds of the first and the second derivative of GELU
GELU_ROUNDINGS = 32  # of its formula in FP32, in units of the size of its argument


def gelu(pre: Tensor) -> Tensor:
    """x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2, in float64."""
    pre = pre.double()
    return pre * (1 + torch.tanh(math.sqrt(2 / math.pi) * (pre + 0.044715 * pre**3))) / 2


def gelu_slope(pre: Tensor) -> Tensor:
    """Its derivative."""
    pre = pre.double()
    k = math.sqrt(2 / math.pi)
    t = torch.tanh(k * (pre + 0.044715 * pre**3))
    return (1 + t) / 2 + pre * (1 - t**2) * k * (1 + 3 * 0.044715 * pre**2) / 2


def after_gelu(pre: Exact) -> Exact:
    """GELU of a value in FP32."""
    bound = GELU_SLOPE * pre.bound + GELU_ROUNDINGS * U32 * (pre.value.abs() + pre.bound)
    return Exact(gelu(pre.value), bound)


def rounded(exact: Exact, dtype: torch.dtype) -> Exact:
    """What is known of a value that was stored in 16 bits."""
    eps = torch.finfo(dtype).eps / 2
    return Exact(exact.value, exact.bound + (exact.value.abs() + exact.bound) * eps + TINY[dtype])


def before_gelu(grad: Exact, pre: Tensor) -> Exact:
    """The gradient of GELU's argument, ``pre`` as it was stored, times the gradient of its result."""
    slope = gelu_slope(pre)
    roundings = GELU_ROUNDINGS * U32 * (1 + pre.double().abs())
    return Exact(grad.value * slope, grad.bound * slope.abs() + (grad.value.abs() + grad.bound) * roundings)
