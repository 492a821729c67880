"""Linear layers as functions, with gradients of FP32 weights in FP32."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._compile import _disable_dynamo
from torch.nn import Parameter

from ..ops import linear as ops
from . import autograd
from .fusions import is_fused

_PLAIN = (Tensor, Parameter)
_HALF = (torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu_tanh", "relu")


def linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute ``input @ weight.T + bias`` as ``F.linear`` does, with gradients that are not rounded to 16
    bits.

    The dtype of the product follows autocast, as for ``F.linear``. If it is FP16 or BF16, the gradients of
    weight and bias are FP32 sums in the dtype of their ``.grad``: FP32 for FP32 parameters and for 16-bit
    leaves with ``grad_dtype=torch.float32``; 16 bits for other 16-bit tensors, as torch. The input gradient
    has 16 bits. FP32 and FP64 products, forward-mode derivatives and tensor subclasses (DTensor, quantized
    weights) are ``F.linear`` itself.

    Where backward accumulates into an FP32 ``weight.grad`` that exists and the weight has no tensor hooks,
    the product
    adds to it in place: ``.grad`` keeps its identity, post-accumulate hooks run, and nothing of its shape is
    allocated. Do not run backward on one weight in two threads at once.

    Args:
        input ([..., K], floating-point), weight ([N, K]), bias ([N] or None): on one device; of one dtype
            without autocast.
    Returns: [..., N] in the dtype of the product.
    Raises: ValueError, TypeError naming the argument, what it got, what it wanted.
    Cost: the products of ``F.linear``. On the CPU FP16 products run in FP32, 15 times as fast as torch's; an
        FP32 weight gradient is an FP32 product, 2 to 4 times as slow as BF16's that rounds. Under autocast
        each call casts an FP32 weight; torch casts it once per autocast region.
    Source: arXiv:1710.03740, section 3.3 (sums in FP32).
    """
    dtype = _product_dtype("linear", (input, weight, bias), ("input", "weight", "bias"))
    if dtype is None:
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
    dtype = _product_dtype("linear_gelu", (input, weight, bias), ("input", "weight", "bias"))
    if dtype is None or not _fuses("gelu", input.device):
        return F.gelu(linear(input, weight, bias), approximate="tanh")
    fuse_bias = is_fused("bias_grad", input.device)
    return autograd.apply(autograd.LinearGELU, input.to(dtype), weight, bias, fuse_bias)


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
    dtype = _product_dtype("mlp", (x, w1, b1, w2, b2), ("x", "w1", "b1", "w2", "b2"))
    if activation == "relu":
        return linear(F.relu(linear(x, w1, b1)), w2, b2)
    if dtype is None or not _fuses("gelu_grad", x.device):
        return linear(linear_gelu(x, w1, b1), w2, b2)
    options = is_fused("gelu", x.device), is_fused("bias_grad", x.device)
    return autograd.apply(autograd.MLP, x.to(dtype), w1, b1, w2, b2, *options)


def need_activation(op: str, activation: Any) -> None:
    if activation in ACTIVATIONS:
        return
    hint = (
        'Did you mean "gelu_tanh"? The exact GELU (erf) has no fused form'
        if activation == "gelu"
        else "Choose one, or use nn.Sequential of fusedamp.nn.Linear and another activation"
    )
    raise ValueError(f'[{op}] activation is {activation!r}; expected "gelu_tanh" or "relu". {hint}.')


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    float32 = torch.is_grad_enabled() and _wants_float32(weight, bias)
    if not float32 and ops.torch_is_fast(input.device.type, dtype):
        return F.linear(input, weight, bias)
    input = input.to(dtype)
    if not torch.is_grad_enabled():
        return ops.linear(input, weight.to(dtype), None if bias is None else bias.to(dtype))
    if _is_transformed():
        return autograd.apply(autograd.TransformedLinear, input, weight, bias)
    arguments = input, weight, bias, is_fused("bias_grad", input.device)
    if torch.compiler.is_compiling() and float32 and weight.dtype in _HALF:
        return _linear_with_float32_grads_of_16_bit_weights(*arguments)
    return autograd.apply(autograd.Linear, *arguments)


@_disable_dynamo
def _linear_with_float32_grads_of_16_bit_weights(*arguments: Any) -> Tensor:
    """Run outside of compiled graphs, which would round the gradient to the dtype of the weight."""
    return autograd.apply(autograd.Linear, *arguments)


def _wants_float32(*parameters: Tensor | None) -> bool:
    return any(
        p is not None and p.requires_grad and autograd.grad_dtype_of(p) is torch.float32 for p in parameters
    )


def _fuses(kind: str, device: torch.device) -> bool:
    """True if an activation runs inside a product."""
    return (
        is_fused(kind, device)
        and torch.is_grad_enabled()
        and autograd.has_ops(device)
        and not _is_transformed()
    )


def _is_transformed() -> bool:
    """True within ``torch.func.grad``, ``vmap`` and others."""
    return bool(torch._C._are_functorch_transforms_active())


def _is_plain(op: str, tensors: tuple[Any, ...], names: tuple[str, ...]) -> bool:
    """True if all are plain tensors or None; raises if one is no tensor at all."""
    plain = True
    for t, name in zip(tensors, names, strict=True):
        if type(t) in _PLAIN or (t is None and name[0] == "b"):
            continue
        if not hasattr(t, "__torch_function__"):
            raise TypeError(f"[{op}] {name} is {t!r}; expected a tensor")
        plain = False
    return plain


def _product_dtype(op: str, tensors: tuple[Any, ...], names: tuple[str, ...]) -> torch.dtype | None:
    """Return the dtype of a 16-bit product; None if it is torch's affair altogether."""
    if not _is_plain(op, tensors, names) or torch.autograd.forward_ad._current_level >= 0:
        return None
    input = tensors[0]
    device, dtype, kind = input.device, input.dtype, input.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    for i in range(1, len(tensors), 2):
        _need_shapes(op, tensors, names, i)
    for t, name in zip(tensors, names, strict=True):
        if t is None:
            continue
        if t.device != device:
            raise ValueError(
                f"[{op}] {name} is on {t.device}; expected {device}, like {names[0]}. Move one of them with "
                ".to()"
            )
        if t.dtype is dtype and t.dtype.is_floating_point:
            continue
        if not t.dtype.is_floating_point and not t.dtype.is_complex:
            raise TypeError(f"[{op}] {name} is {t.dtype}; expected a floating-point tensor. Cast it")
        if not autocast and t.dtype is not dtype:
            raise ValueError(
                f"[{op}] {name} is {t.dtype}; expected {dtype}, like {names[0]}. Cast one of them, or run "
                f'under torch.autocast("{kind}")'
            )
    if autocast:  # which casts no FP64
        dtype = torch.get_autocast_dtype(kind)
        if any(t is not None and (t.dtype is torch.float64 or t.dtype.is_complex) for t in tensors):
            return None
    return dtype if dtype in _HALF and kind != "meta" else None


def _need_shapes(op: str, tensors: tuple[Any, ...], names: tuple[str, ...], i: int) -> None:
    """Check a weight, the bias after it, and what the weight is multiplied with: the input or the weight
    before."""
    weight, bias = tensors[i], tensors[i + 1]
    if weight.dim() != 2:
        _refuse_shape(op, names[i], weight, "[out_features, in_features]")
    before = tensors[i - 1 if i == 1 else i - 2]
    if i == 1 and (before.dim() == 0 or before.shape[-1] != weight.shape[1]):
        _refuse_shape(op, names[0], before, f"[..., {weight.shape[1]}]", names[1], weight)
    if i > 1 and weight.shape[1] != before.shape[0]:
        _refuse_shape(op, names[i], weight, f"[..., {before.shape[0]}]", names[i - 2], before)
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != weight.shape[0]):
        _refuse_shape(op, names[i + 1], bias, f"[{weight.shape[0]}]", names[i], weight)


def _refuse_shape(
    op: str, name: str, got: Tensor, wanted: str, like_name: str = "", like: Tensor | None = None
) -> NoReturn:
    why = "" if like is None else f", as {like_name} {list(like.shape)}"
    raise ValueError(f"[{op}] {name} has shape {list(got.shape)}; expected {wanted}{why}")
