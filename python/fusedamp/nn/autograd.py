"""How gradients of linear layers reach their parameters: in FP32 from the product, added in place where
nothing stands between it and ``.grad``.

torch's autograd casts a weight's gradient to the dtype of the product, 16 bits, before it adds it up. The
functions here return it in FP32, or add it to the parameter's ``.grad`` inside the product, and return None.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..ops import library, linear

_SKIP: Any = object()  # nobody wants the gradient


def grad_dtype_of(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a tensor's gradient: ``grad_dtype`` of a leaf, else its own."""
    if tensor.dtype in (torch.float16, torch.bfloat16) and tensor.is_leaf:
        return _leaf_grad_dtype(tensor)
    return tensor.dtype


def _leaf_grad_dtype(leaf: Tensor) -> torch.dtype:
    return leaf.grad_dtype or leaf.dtype


# torch.compile cannot trace grad_dtype: it calls the function once, as torch.compiler.assume_constant_result
# tells it to, which takes a second to import.
_leaf_grad_dtype._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _engine_runs(accumulate: Any) -> bool | None:
    """True if the running backward executes AccumulateGrad of a weight; None if that is unknown, or if it
    returns the gradient instead (``torch.autograd.grad``)."""
    try:
        return bool(torch._C._will_engine_execute_node(accumulate))
    except (AttributeError, RuntimeError):
        return None


def _on_its_stream(weight: Tensor) -> bool:
    """True if AccumulateGrad of ``weight`` cannot run on another stream than the current one."""
    if not weight.is_cuda:
        return True
    current = torch.cuda.current_stream(weight.device)
    return current == torch.cuda.default_stream(weight.device) or torch.cuda.is_current_stream_capturing()


def _accumulator(weight: Tensor | None, accumulate: Any) -> Any:
    """Return the tensor to add the gradient of ``weight`` to; None to return the gradient, ``_SKIP`` to make
    none.

    In place only if the engine accumulates into this leaf, in FP32, and no hook of the tensor would see the
    gradient. ``accumulate``: the node after this one, AccumulateGrad if the weight is a leaf.
    """
    if weight is None or torch.compiler.is_compiling() or not weight.is_leaf:
        return None
    runs = _engine_runs(accumulate)
    if runs is None:
        return None
    if not runs:
        return _SKIP
    grad = weight.grad
    plain = (
        type(grad) is Tensor
        and grad.dtype is torch.float32
        and grad.layout is torch.strided
        and grad.is_contiguous()
        and not grad.requires_grad
    )
    return grad if plain and not weight._backward_hooks and _on_its_stream(weight) else None


class Layer(NamedTuple):
    """A weight and a bias as backward needs them."""

    weight: Tensor | None  # itself; None in a traced backward, which would record today's .grad
    version: int
    weight_dtype: torch.dtype  # of its gradient
    bias_dtype: torch.dtype | None
    fuse_bias: bool  # whether the weight's product makes the bias's gradient

    def grads(
        self, grad: Tensor, x: Tensor, needs: tuple[bool, bool], accumulate: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, None for what was added in place or is not needed."""
        into = _accumulator(self.weight, accumulate) if needs[0] else _SKIP
        weight_grad = sums = None
        fuse = needs[1] and self.fuse_bias
        if into is None:
            weight_grad, sums = linear.weight_grad(grad, x, self.weight_dtype, fuse)
        elif into is not _SKIP:
            sums = linear.add_weight_grad(into, grad, x, fuse)
        if not needs[1]:
            return weight_grad, None
        if not fuse or sums is None:
            sums = grad.sum(0, dtype=torch.float32)
        return weight_grad, sums if sums.dtype is self.bias_dtype else sums.to(self.bias_dtype)

    def composed_grads(
        self, grad: Tensor, x: Tensor | None, weight: Tensor | None, needs: tuple[bool, ...]
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Return the gradients of x, weight and bias by torch operations, which are differentiable and run
        anywhere. ``weight``: what forward used."""
        if weight is not None and torch.is_grad_enabled():
            weight = self._differentiable(weight)
        with torch.autocast(grad.device.type, enabled=False):
            flat = grad.reshape(-1, grad.shape[-1])
            x_grad = torch.matmul(grad, weight) if weight is not None and needs[0] else None
            weight_grad = bias_grad = None
            if x is not None and needs[1]:
                weight_grad = flat.t().float() @ x.reshape(-1, x.shape[-1]).float()
                weight_grad = weight_grad.to(self.weight_dtype)
            if needs[2]:
                bias_grad = flat.sum(0, dtype=torch.float32).to(self.bias_dtype)
            return x_grad, weight_grad, bias_grad

    def _differentiable(self, used: Tensor) -> Tensor:
        if self.weight is None or self.weight.dtype is used.dtype:
            return used
        if self.weight._version != self.version:
            raise RuntimeError(
                f"[linear] weight was modified since forward (version {self.weight._version}; expected "
                f"{self.version}), and create_graph=True needs its value. Run backward before the step."
            )
        return self.weight.to(used.dtype)


def layer_of(
    weight: Tensor, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None, fuse_bias: bool
) -> Layer:
    """``weight_dtype``, ``bias_dtype``: of the gradients."""
    if torch.compiler.is_compiling():
        return Layer(None, 0, weight_dtype, bias_dtype, fuse_bias)
    return Layer(weight, weight._version, weight_dtype, bias_dtype, fuse_bias)


def as_rows(t: Tensor) -> Tensor:
    """``t`` as a matrix."""
    return t if t.dim() == 2 else t.reshape(-1, t.shape[-1])


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


class Linear(torch.autograd.Function):
    """``F.linear`` of a 16-bit input, with gradients of weight and bias in their ``grad_dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        dtype = x.dtype
        used = cast(weight, dtype)
        needs = ctx.needs_input_grad
        ctx.save_for_backward(x if needs[1] else None, used if needs[0] else None)
        return linear.linear(x, used, None if bias is None else cast(bias, dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        needs, layer = ctx.needs_input_grad, ctx.layer
        if torch.is_grad_enabled() or not has_ops(grad):
            return *layer.composed_grads(grad, x, weight, needs), None
        flat = as_rows(grad)
        x_grad = weight_grad = bias_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(flat, weight)
            if flat is not grad:
                x_grad = x_grad.view(*grad.shape[:-1], weight.shape[1])
        if needs[1]:
            accumulate = None if torch.compiler.is_compiling() else ctx.next_functions[1][0]
            weight_grad, bias_grad = layer.grads(flat, as_rows(x), needs[1:3], accumulate)
        elif needs[2]:
            bias_grad = flat.sum(0, dtype=torch.float32).to(layer.bias_dtype)
        return x_grad, weight_grad, bias_grad, None


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
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: Layer) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer = layer
        used, flat = cast(weight, x.dtype), as_rows(x)
        y, pre = linear.linear_gelu(flat, used, None if bias is None else cast(bias, x.dtype))
        ctx.save_for_backward(flat, used, pre)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        _refuse_double_backward("linear_gelu")
        x, weight, pre = ctx.saved_tensors
        needs = ctx.needs_input_grad
        accumulate = None if torch.compiler.is_compiling() else ctx.next_functions[1][0]
        inner = torch.ops.aten.gelu_backward(grad.reshape(pre.shape), pre, approximate="tanh")
        x_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(inner, weight).view(*grad.shape[:-1], weight.shape[1])
        return x_grad, *ctx.layer.grads(inner, x, needs[1:3], accumulate), None


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
        fuse_gelu: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layers, ctx.second_at = layers, 2 + (b1 is not None)
        flat, dtype = as_rows(x), x.dtype
        c1, c2 = cast(w1, dtype), cast(w2, dtype)
        d1, d2 = (None if b is None else cast(b, dtype) for b in (b1, b2))
        if fuse_gelu:
            hidden, pre = linear.linear_gelu(flat, c1, d1)
        else:
            pre = linear.linear(flat, c1, d1)
            hidden = F.gelu(pre, approximate="tanh")
        ctx.save_for_backward(flat, c1, pre, hidden, c2)
        return linear.linear(hidden, c2, d2).view(*x.shape[:-1], w2.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * 7
        _refuse_double_backward("mlp")
        x, w1, pre, hidden, w2 = ctx.saved_tensors
        needs, (first, second) = ctx.needs_input_grad, ctx.layers
        after = (None,) * 5 if torch.compiler.is_compiling() else [node for node, _ in ctx.next_functions]
        flat = as_rows(grad)
        second_grads = second.grads(flat, hidden, needs[3:5], after[ctx.second_at])
        if not any(needs[:3]):
            return None, None, None, *second_grads, None, None
        dtype = first.bias_dtype or torch.float32
        inner, sums = linear.linear_gelu_input_grad(flat, w2, pre, bias_grad=needs[2], bias_dtype=dtype)
        x_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(inner, w1).view(*grad.shape[:-1], w1.shape[1])
        weight_grad, _ = first.grads(inner, x, (needs[1], False), after[1])
        return x_grad, weight_grad, sums if needs[2] else None, *second_grads, None, None
