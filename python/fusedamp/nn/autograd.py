"""Linear layers as autograd functions. gradients.py says where their parameters' gradients go."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import library, linear
from .gradients import Layer


def cast(t: Tensor, dtype: torch.dtype) -> Tensor:
    """``t.to(dtype)``, 16 bits; these methods take half its host time."""
    if t.dtype is dtype:
        return t
    return t.bfloat16() if dtype is torch.bfloat16 else t.half()


def has_ops(t: Tensor) -> bool:
    """True if there are kernels for the device of ``t``."""
    return t.is_cpu or (t.is_cuda and library.HAS_CUDA_OPS)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply``, typed. Without its question about the transforms of ``torch.func``: the caller has
    asked."""
    if torch.compiler.is_compiling():
        return apply_transformed(function, *arguments)
    y: Tensor = super(torch.autograd.Function, function).apply(*arguments)  # type: ignore[misc]
    return y


def apply_transformed(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    y: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


def _itself(t: Tensor) -> Tensor:
    return t


def autocast_copy(weight: Tensor, dtype: torch.dtype) -> Tensor | None:
    """Return the 16-bit copy of an FP32 parameter that autocast keeps until its region ends: all calls in the
    region then save the same memory. None to cast it; small ones are cast faster.

    torch has no function for this. A product without rows takes the copy, and saves it for its gradient.
    """
    if weight.numel() < 1 << 16 or weight.dtype is not torch.float32 or torch.compiler.is_compiling():
        return None
    rows = torch.empty(0, weight.shape[1], device=weight.device, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(_itself, _itself):  # not checkpoint's or offload's
        saved = getattr(F.linear(rows, weight).grad_fn, "_saved_mat2", None)
    if saved is None or saved.dtype is not dtype or saved.shape != (weight.shape[1], weight.shape[0]):
        return None
    copy: Tensor = saved.detach().t()
    return copy


class Linear(torch.autograd.Function):
    """``F.linear`` of a 16-bit matrix, with gradients of weight and bias in their ``grad_dtype``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, copy: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        dtype = x.dtype
        used = cast(weight, dtype) if copy is None else copy
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, used if needs[0] else None)
        return linear.linear(x, used, None if bias is None else cast(bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        x, weight = ctx.saved_tensors
        needs, layer = ctx.needs_input_grad, ctx.layer
        if grad.is_sparse:
            grad = grad.to_dense()
        if torch.is_grad_enabled() or not has_ops(grad):
            return *layer.composed_grads(grad, x, weight, needs), None, None
        x_grad = weight_grad = bias_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(grad, weight)
        if needs[1]:
            accumulate = None if torch.compiler.is_compiling() else ctx.next_functions[1][0]
            weight_grad, bias_grad = layer.grads(grad, x, needs[1:3], accumulate)
        elif needs[2]:
            bias_grad = grad.sum(0, dtype=torch.float32).to(layer.bias_dtype)
        return x_grad, weight_grad, bias_grad, None, None


class TransformedLinear(torch.autograd.Function):
    """The same for the transforms of ``torch.func``, which want every value returned."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, bias = inputs
        ctx.save_for_backward(x, weight)
        ctx.layer = Layer(None, 0, weight.dtype, None if bias is None else bias.dtype, False)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grads: tuple[Tensor | None, ...] = ctx.layer.composed_grads(
            grad, x, weight.to(x.dtype), ctx.needs_input_grad
        )
        return grads


def _refuse_double_backward(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"[{op}] fused GELU has no second derivative (create_graph=True). Use torch.nn.functional.gelu "
            "after fusedamp.nn.functional.linear, or fusedamp.nn.fusions(gelu=False, gelu_grad=False)."
        )


class LinearGELU(torch.autograd.Function):
    """``gelu(F.linear(...), approximate="tanh")`` in one product."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer, copy: Tensor | None
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        used = cast(weight, x.dtype) if copy is None else copy
        y, pre = linear.linear_gelu(x, used, None if bias is None else cast(bias, x.dtype))
        ctx.save_for_backward(x, used, pre)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None
        _refuse_double_backward("linear_gelu")
        x, weight, pre = ctx.saved_tensors
        needs = ctx.needs_input_grad
        accumulate = None if torch.compiler.is_compiling() else ctx.next_functions[1][0]
        inner = torch.ops.aten.gelu_backward(grad, pre, approximate="tanh")
        x_grad = linear.linear_input_grad(inner, weight) if needs[0] else None
        return x_grad, *ctx.layer.grads(inner, x, needs[1:3], accumulate), None, None


class MLP(torch.autograd.Function):
    """Two linear layers with GELU between, whose gradient is made in the product before it in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        layers: tuple[Layer, Layer],
        copies: tuple[Tensor | None, Tensor | None],
        fuse_gelu: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.second_at = layers, 2 + (b1 is not None)
        dtype = x.dtype
        c1, c2 = (cast(w, dtype) if copy is None else copy for w, copy in zip((w1, w2), copies, strict=True))
        d1, d2 = (None if b is None else cast(b, dtype) for b in (b1, b2))
        if fuse_gelu:
            hidden, pre = linear.linear_gelu(x, c1, d1)
        else:
            pre = linear.linear(x, c1, d1)
            hidden = F.gelu(pre, approximate="tanh")
        ctx.save_for_backward(x, c1, pre, hidden, c2)
        return linear.linear(hidden, c2, d2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 8
        _refuse_double_backward("mlp")
        x, w1, pre, hidden, w2 = ctx.saved_tensors
        needs, (first, second) = ctx.needs_input_grad, ctx.layers
        after = (None,) * 5 if torch.compiler.is_compiling() else [node for node, _ in ctx.next_functions]
        second_grads = second.grads(grad, hidden, needs[3:5], after[ctx.second_at])
        if not any(needs[:3]):
            return None, None, None, *second_grads, None, None, None
        dtype = first.bias_dtype or torch.float32
        inner, sums = linear.linear_gelu_input_grad(grad, w2, pre, bias_grad=needs[2], bias_dtype=dtype)
        x_grad = linear.linear_input_grad(inner, w1) if needs[0] else None
        weight_grad, _ = first.grads(inner, x, (needs[1], False), after[1])
        return x_grad, weight_grad, sums if needs[2] else None, *second_grads, None, None, None
