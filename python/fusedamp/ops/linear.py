"""Ops of linear layers: products of 16-bit matrices with FP32 sums, and weight gradients in FP32.

All tensors are matrices on one device, in one 16-bit dtype, with any strides: x [M, K], weight [N, K], grad
[M, N]. On CUDA the products are cuBLASLt's; what that refuses for a shape or an alignment is made of FP32
products (``fusedamp.nn.fusions()`` names these). On the CPU they are torch's FP32 products.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from . import library
from .call import bump, call


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Compute ``pre = x @ weight.T + bias`` and ``y = gelu(pre)``, the tanh approximation.

    Args:
        x ([M, K], fp16|bf16), weight ([N, K]), bias ([N] or None): read only, one dtype.
    Returns: y and pre, both [M, N] in that dtype, each an fp32 value that was rounded once.
    Raises: ValueError naming the op, the argument, what it got, what it wanted.
    Cost: one product; no host sync.
    Source: arXiv:1606.08415, section 2 (GELU).
    """
    y, pre = call("linear_gelu", x, weight, bias)
    return y, pre


def linear_gelu_input_grad(
    grad: Tensor, weight: Tensor, pre: Tensor, *, bias_grad: bool, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Compute the gradient of ``pre`` in ``linear(gelu(pre), weight)``: ``(grad @ weight) * gelu'(pre)``.

    Args:
        grad ([M, N], fp16|bf16), weight ([N, K]), pre ([M, K]): read only, one dtype.
        bias_grad: return also its sums over the rows, summed in fp32.
        bias_dtype: of the sums: fp32, or the dtype of grad.
    Returns: [M, K] in the dtype of grad, and [K] in bias_dtype (empty without bias_grad).
    Raises: ValueError naming the op, the argument, what it got, what it wanted.
    Cost: one product; no host sync.
    Source: arXiv:1606.08415, section 2 (GELU).
    """
    out, sums = call("linear_gelu_input_grad", grad, weight, pre, bias_grad=bias_grad, bias_dtype=bias_dtype)
    return out, sums


def linear_weight_grad(
    grad: Tensor, x: Tensor, *, dtype: torch.dtype, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    """Compute ``grad.T @ x``, the gradient of a linear layer's weight, and of its bias.

    Args:
        grad ([M, N], fp16|bf16), x ([M, K]): read only, one dtype.
        dtype: of the results: fp32, or the dtype of grad.
        bias_grad: return also ``grad.sum(0)``, summed in fp32.
    Returns: [N, K] and [N] (empty without bias_grad), both in ``dtype``. With fp32 nothing is rounded to 16
        bits.
    Raises: ValueError naming the op, the argument, what it got, what it wanted.
    Cost: one product; on the CPU an FP32 one of upcast operands; no host sync.
    Source: arXiv:1710.03740, section 3.3.
    """
    out, sums = call("linear_weight_grad", grad, x, dtype=dtype, bias_grad=bias_grad)
    return out, sums


def linear_weight_grad_(acc: Tensor, grad: Tensor, x: Tensor, *, bias_grad: bool) -> Tensor:
    """Add ``grad.T @ x``, the gradient of a linear layer's weight, to ``acc``.

    Args:
        acc ([N, K], fp32, contiguous): rewritten; shares no memory with grad and x.
        grad ([M, N], fp16|bf16), x ([M, K]): read only, one dtype.
        bias_grad: return ``grad.sum(0)``, summed in fp32.
    Returns: [N] in fp32 (empty without bias_grad). If M is 0, acc is not touched.
    Raises: ValueError naming the op, the argument, what it got, what it wanted.
    Cost: one product that adds; nothing of the shape of acc is allocated; no host sync.
    Source: arXiv:1710.03740, section 3.3.
    """
    sums: Tensor = call("linear_weight_grad_", acc, grad, x, bias_grad=bias_grad)
    bump([acc])
    return sums


def _has_fp16_products() -> bool:
    try:  # oneDNN has kernels for processors with FP16 arithmetic; on others torch's loop runs
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    except (AttributeError, RuntimeError):
        return False


_FP16_IS_FAST = _has_fp16_products()


def torch_is_fast(t: Tensor, dtype: torch.dtype) -> bool:
    """True if torch's own 16-bit products on the device of ``t`` run at the speed of the hardware."""
    return dtype is not torch.float16 or _FP16_IS_FAST or not t.is_cpu


def has_few_rows(x: Tensor, weight: Tensor) -> bool:
    """True if casting an FP16 weight to FP32 takes longer than torch's own FP16 product with ``x``.

    On one and two cores the two are equal at 5 rows with weights in the cache, and at 40 with others.
    """
    return x.numel() < weight.shape[1] * (8 if weight.numel() <= 1 << 22 else 48)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of a 16-bit matrix; by an FP32 product where FP16 ones are slow."""
    if torch_is_fast(x, x.dtype) or has_few_rows(x, weight):
        return F.linear(x, weight, bias)
    product: Tensor = torch.ops.fusedamp._linear(x, weight, bias)
    return product


def linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    """``grad @ weight`` of 16-bit matrices of one dtype; by FP32 products where FP16 ones are slow."""
    if torch_is_fast(grad, grad.dtype):
        return torch.mm(grad, weight)
    product: Tensor = torch.ops.fusedamp._linear_input_grad(grad, weight)
    return product


class ProductUse(NamedTuple):
    """A kind of product that cuBLASLt was asked for in this process."""

    device: int
    epilogue: str
    inputs: str
    output: str
    accumulate: bool
    calls: int
    refused: str
    """Why torch's own products were taken instead; empty if the library ran it."""


def product_uses() -> list[ProductUse]:
    """Return what cuBLASLt was asked for so far."""
    if not library.HAS_CUDA_OPS:
        return []
    uses = []
    for line in str(torch.ops.fusedamp._product_uses()).splitlines():
        device, epilogue, inputs, output, accumulate, calls, refused = line.split("\t")
        uses.append(ProductUse(int(device), epilogue, inputs, output, accumulate == "1", int(calls), refused))
    return uses


def _need_one_device(*tensors: Tensor | None) -> None:
    if len({t.is_meta for t in tensors if t is not None}) > 1:
        raise RuntimeError("some tensors are on the meta device and others are not")


def _fake_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    _need_one_device(x, weight, bias)
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_linear_input_grad(grad: Tensor, weight: Tensor) -> Tensor:
    _need_one_device(grad, weight)
    return grad.new_empty(grad.shape[0], weight.shape[1])


def _fake_linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    _need_one_device(x, weight, bias)
    y = x.new_empty(x.shape[0], weight.shape[0])
    return y, torch.empty_like(y)


def _fake_linear_gelu_input_grad(
    grad: Tensor, weight: Tensor, pre: Tensor, *, bias_grad: bool, bias_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    _need_one_device(grad, weight, pre)
    return grad.new_empty(pre.shape), grad.new_empty(pre.shape[1] if bias_grad else 0, dtype=bias_dtype)


def _fake_linear_weight_grad(
    grad: Tensor, x: Tensor, *, dtype: torch.dtype, bias_grad: bool
) -> tuple[Tensor, Tensor]:
    _need_one_device(grad, x)
    return (
        grad.new_empty(grad.shape[1], x.shape[1], dtype=dtype),
        grad.new_empty(grad.shape[1] if bias_grad else 0, dtype=dtype),
    )


def _fake_linear_weight_grad_(acc: Tensor, grad: Tensor, x: Tensor, *, bias_grad: bool) -> Tensor:
    _need_one_device(acc, grad, x)
    return grad.new_empty(grad.shape[1] if bias_grad else 0, dtype=acc.dtype)


_FAKES: dict[str, Callable[..., Any]] = {
    "_linear": _fake_linear,
    "_linear_input_grad": _fake_linear_input_grad,
    "linear_gelu": _fake_linear_gelu,
    "linear_gelu_input_grad": _fake_linear_gelu_input_grad,
    "linear_weight_grad": _fake_linear_weight_grad,
    "linear_weight_grad_": _fake_linear_weight_grad_,
}
for _name, _fake in _FAKES.items():
    torch.library.register_fake(f"fusedamp::{_name}", _fake)


@register_flop_formula([torch.ops.fusedamp._linear, torch.ops.fusedamp.linear_gelu])
def _forward_flops(x: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * x[0] * x[1] * weight[0]


@register_flop_formula([torch.ops.fusedamp._linear_input_grad, torch.ops.fusedamp.linear_gelu_input_grad])
def _input_grad_flops(grad: list[int], weight: list[int], *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * weight[1]


@register_flop_formula(torch.ops.fusedamp.linear_weight_grad)
def _weight_grad_flops(grad: list[int], x: list[int], *_: Any, **__: Any) -> int:
    return 2 * grad[0] * grad[1] * x[1]


@register_flop_formula(torch.ops.fusedamp.linear_weight_grad_)
def _added_weight_grad_flops(_acc: list[int], grad: list[int], x: list[int], *_: Any, **__: Any) -> int:
    return _weight_grad_flops(grad, x)
