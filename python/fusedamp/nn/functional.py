"""Linear layers as functions, with gradients of FP32 weights in FP32."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo

from ..ops import linear as ops
from . import autograd
from .arguments import HALF, need_activation, product_dtype, quick_dtype
from .fusions import is_fused
from .gradients import Layer, grad_dtype_of, layer_of

__all__ = ["linear", "linear_gelu", "mlp"]


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``input @ weight.T + bias`` as ``F.linear`` does, with gradients that are not rounded to 16
    bits.

    The dtype of the product follows autocast, as for ``F.linear``. If it is FP16 or BF16, the gradients of
    weight and bias are FP32 sums in the dtype of their ``.grad``: FP32 for FP32 parameters and for 16-bit
    leaves with ``grad_dtype=torch.float32``; 16 bits for other 16-bit tensors, as torch. The input gradient
    has 16 bits. FP32 and FP64 products, forward-mode derivatives and tensor subclasses (DTensor, quantized
    weights) are ``F.linear`` itself.

    Where backward accumulates into an FP32 ``weight.grad`` that exists and the weight has no tensor hooks,
    the product adds to it in place: ``.grad`` keeps its identity, post-accumulate hooks run, and nothing of
    its shape is allocated. Three things cannot be seen from here: hooks of the AccumulateGrad node itself get
    None for such a gradient; code that reads or replaces ``.grad`` while backward still runs sees partial
    sums; two threads must not run backward on one weight at once.

    Args:
        input ([..., K], floating-point), weight ([N, K]), bias ([N] or None): on one device; of one dtype
            without autocast.
    Returns: [..., N] in the dtype of the product.
    Raises: ValueError, TypeError naming the argument, what it got, what it wanted.
    Cost: the products of ``F.linear``. On a CPU an FP32 weight gradient is an FP32 product, at a quarter to
        all of the speed of BF16's, which rounds; without FP16 arithmetic there, FP16 products run in FP32
        where that is faster, forward and backward together 8 to 50 times as fast as torch's. Weights
        of 65,536 elements and more are cast once per autocast region, as by torch.
    Source: arXiv:1710.03740, section 3.3 (sums in FP32).
    """
    dtype = quick_dtype(input, weight, bias) or product_dtype(
        "linear", (input, weight, bias), ("input", "weight", "bias")
    )
    if dtype not in HALF:
        if isinstance(input, torch.fx.Proxy):  # a graph records this function, not F.linear
            y: Tensor = torch.overrides.handle_torch_function(linear, (input,), input, weight, bias)
            return y
        return F.linear(input, weight, bias)
    return _linear(input, weight, bias, dtype)


def linear_gelu(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``F.gelu(linear(input, weight, bias), approximate="tanh")``, in one product where that is
    faster.

    As :func:`linear`; :func:`fusedamp.nn.fusions` tells where GELU runs inside the product. There its
    argument is not rounded to 16 bits, and it has no second derivative.

    Args:
        input ([..., K], floating-point), weight ([N, K]), bias ([N] or None): as for :func:`linear`.
    Returns: [..., N] in the dtype of the product.
    Raises: ValueError, TypeError naming the argument, what it got, what it wanted.
    Cost: as :func:`linear`, and GELU.  Source: arXiv:1606.08415, section 2.
    """
    dtype = product_dtype("linear_gelu", (input, weight, bias), ("input", "weight", "bias"))
    if dtype not in HALF or not _fuses("gelu", input):
        return F.gelu(linear(input, weight, bias), approximate="tanh")
    rows = _rows(autograd.cast(input, dtype))
    arguments = rows, weight, bias, _layer(weight, bias), autograd.autocast_copy(weight, dtype)
    return _unflatten(autograd.apply(autograd.LinearGELU, *arguments), input)


def mlp(
    x: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    *,
    activation: str = "gelu_tanh",
) -> Tensor:
    """Compute two linear layers with an activation between: ``linear(activation(linear(x, w1, b1)), w2,
    b2)``.

    As :func:`linear`; :func:`fusedamp.nn.fusions` tells which parts of GELU run inside the products.

    Args:
        x ([..., K], floating-point), w1 ([H, K]), b1 ([H] or None), w2 ([N, H]), b2 ([N] or None): as for
            :func:`linear`.
        activation: "gelu_tanh" (the tanh approximation; the exact one has no fused form) or "relu".
    Returns: [..., N] in the dtype of the products.
    Raises: ValueError, TypeError naming the argument, what it got, what it wanted.
    Cost: as two :func:`linear` and the activation.  Source: arXiv:1606.08415, section 2.
    """
    need_activation("mlp", activation)
    dtype = product_dtype("mlp", (x, w1, b1, w2, b2), ("x", "w1", "b1", "w2", "b2"))
    if activation == "relu":
        return linear(F.relu(linear(x, w1, b1)), w2, b2)
    if dtype not in HALF or not _fuses("gelu_grad", x):
        return linear(linear_gelu(x, w1, b1), w2, b2)
    layers = _layer(w1, b1), _layer(w2, b2)
    copies = autograd.autocast_copy(w1, dtype), autograd.autocast_copy(w2, dtype)
    rows = _rows(autograd.cast(x, dtype))
    y = autograd.apply(autograd.MLP, rows, w1, b1, w2, b2, layers, copies, is_fused("gelu", x))
    return _unflatten(y, x)


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    weight_dtype = grad_dtype_of(weight)
    bias_dtype = None if bias is None else grad_dtype_of(bias)
    transformed = _is_transformed()  # a compiler sees no requires_grad in there
    grads = float32 = False
    if torch.is_grad_enabled():
        float32 = (weight_dtype is torch.float32 and (weight.requires_grad or transformed)) or (
            bias is not None and bias_dtype is torch.float32 and (bias.requires_grad or transformed)
        )
        grads = (
            float32
            or input.requires_grad
            or weight.requires_grad
            or (bias is not None and bias.requires_grad)
        )
    if not float32 and (ops.torch_is_fast(input, dtype) or (not grads and ops.has_few_rows(input, weight))):
        return F.linear(input, weight, bias)
    rows = _rows(autograd.cast(input, dtype))
    if not grads:
        bias = None if bias is None else autograd.cast(bias, dtype)
        y = ops.linear(rows, autograd.cast(weight, dtype), bias)
    elif transformed:
        if torch.compiler.is_compiling():  # it would trace the forward function alone, and round the gradient
            raise NotImplementedError(
                "[linear] torch.func inside torch.compile; call the transform in eager mode"
            )
        y = autograd.apply_transformed(autograd.TransformedLinear, rows, weight, bias)
    else:
        layer = layer_of(weight, weight_dtype, bias_dtype, is_fused("bias_grad", input))
        arguments = rows, weight, bias, layer, autograd.autocast_copy(weight, dtype)
        if float32 and weight.dtype in HALF and torch.compiler.is_compiling():
            y = _linear_with_float32_grads_of_16_bit_weights(*arguments)
        else:
            y = autograd.apply(autograd.Linear, *arguments)
    return _unflatten(y, input)


@_disable_dynamo
def _linear_with_float32_grads_of_16_bit_weights(*arguments: Any) -> Tensor:
    """Run outside of compiled graphs, which would round the gradient to the dtype of the weight."""
    return autograd.apply(autograd.Linear, *arguments)


# Views are made outside of the functions: in-place operations on a view that a function returned would raise.
def _rows(t: Tensor) -> Tensor:
    if t.dim() == 2:
        return t
    return t.flatten(0, -2) if t.dim() > 2 else t[None]


def _unflatten(y: Tensor, input: Tensor) -> Tensor:
    return y if input.dim() == 2 else y.view(*input.shape[:-1], y.shape[1])


def _layer(weight: Tensor, bias: Tensor | None) -> Layer:
    bias_dtype = None if bias is None else grad_dtype_of(bias)
    return layer_of(weight, grad_dtype_of(weight), bias_dtype, is_fused("bias_grad", weight))


def _fuses(kind: str, input: Tensor) -> bool:
    """True if an activation runs inside a product."""
    return (
        is_fused(kind, input)
        and torch.is_grad_enabled()
        and autograd.has_ops(input)
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    """True within ``torch.func.grad``, ``vmap`` and others."""
    return bool(torch._C._are_functorch_transforms_active())
