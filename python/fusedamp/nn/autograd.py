"""How gradients of linear layers reach their parameters: in FP32 from the product, added in place where
nothing stands between it and ``.grad``.

torch's autograd casts a weight's gradient to the dtype of the product, 16 bits, before it adds it up. The
functions here return it in FP32, or add it to the parameter's ``.grad`` inside the product, and return None.
"""

from __future__ import annotations

from typing import Any

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


def _engine_runs(weight: Tensor) -> bool | None:
    """True if the running backward accumulates into ``weight.grad``; None if that is unknown, or if it
    returns the gradient instead (``torch.autograd.grad``)."""
    try:
        node = torch.autograd.graph.get_gradient_edge(weight).node
        return bool(torch._C._will_engine_execute_node(node))
    except (AttributeError, RuntimeError):
        return None


def _on_its_stream(weight: Tensor) -> bool:
    """True if AccumulateGrad of ``weight`` cannot run on another stream than the current one."""
    if weight.device.type != "cuda":
        return True
    current = torch.cuda.current_stream(weight.device)
    return current == torch.cuda.default_stream(weight.device) or torch.cuda.is_current_stream_capturing()


def _accumulator(weight: Tensor | None) -> Any:
    """Return the tensor to add the gradient of ``weight`` to; None to return the gradient, ``_SKIP`` to make
    none.

    In place only if the engine accumulates into this leaf, in FP32, and no hook of the tensor would see the
    gradient.
    """
    if weight is None or not weight.is_leaf or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return None
    runs = _engine_runs(weight)
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


class _Layer:
    """A weight and a bias as backward needs them: the parameters themselves, and the dtypes of their
    gradients."""

    def __init__(self, weight: Tensor, bias: Tensor | None, fuse_bias: bool) -> None:
        # A traced backward would record today's .grad; it returns gradients.
        self.weight = None if torch.compiler.is_compiling() else weight
        self.version = 0 if self.weight is None else weight._version
        self.weight_dtype = grad_dtype_of(weight)
        self.bias_dtype = None if bias is None else grad_dtype_of(bias)
        self.fuse_bias = fuse_bias

    def grads(self, grad: Tensor, x: Tensor, needs: tuple[bool, bool]) -> tuple[Tensor | None, Tensor | None]:
        """Return the gradients of weight and bias, None for what was added in place or is not needed."""
        into = _accumulator(self.weight) if needs[0] else _SKIP
        weight_grad = sums = None
        fuse = needs[1] and self.fuse_bias
        if into is None:
            weight_grad, sums = linear.linear_weight_grad(grad, x, dtype=self.weight_dtype, bias_grad=fuse)
        elif into is not _SKIP:
            sums = linear.linear_weight_grad_(into, grad, x, bias_grad=fuse)
        if not needs[1]:
            return weight_grad, None
        if not fuse or sums is None:
            sums = grad.sum(0, dtype=torch.float32)
        return weight_grad, sums.to(self.bias_dtype)

    def differentiable_weight(self, saved: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the weight as a differentiable function of the parameter. ``saved``: what forward used."""
        if self.weight is None or self.weight.dtype is dtype:
            return saved
        if self.weight._version != self.version:
            raise RuntimeError(
                f"[linear] weight was modified since forward (version {self.weight._version}; expected "
                f"{self.version}), and create_graph=True needs its value. Run backward before the step."
            )
        return self.weight.to(dtype)


def _composed_grads(
    grad: Tensor, x: Tensor | None, weight: Tensor | None, layer: Any, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias by torch operations, which are differentiable and run
    anywhere."""
    with torch.autocast(grad.device.type, enabled=False):
        flat = grad.reshape(-1, grad.shape[-1])
        x_grad = torch.matmul(grad, weight) if weight is not None and needs[0] else None
        weight_grad = bias_grad = None
        if x is not None and needs[1]:
            weight_grad = flat.t().float() @ x.reshape(-1, x.shape[-1]).float()
            weight_grad = weight_grad.to(layer.weight_dtype)
        if needs[2]:
            bias_grad = flat.sum(0, dtype=torch.float32).to(layer.bias_dtype)
        return x_grad, weight_grad, bias_grad


def has_ops(device: torch.device) -> bool:
    """True if there are kernels for ``device``."""
    return device.type == "cpu" or (device.type == "cuda" and library.HAS_CUDA_OPS)


def apply(function: type[torch.autograd.Function], *arguments: Any) -> Tensor:
    """``function.apply``, typed."""
    y: Tensor = function.apply(*arguments)  # type: ignore[no-untyped-call]
    return y


class Linear(torch.autograd.Function):
    """``F.linear`` of a 16-bit input, with gradients of weight and bias in their ``grad_dtype``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fuse_bias: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer = _Layer(weight, bias, fuse_bias)
        cast = weight.to(x.dtype)
        ctx.save_for_backward(
            x if ctx.needs_input_grad[1] else None, cast if ctx.needs_input_grad[0] else None
        )
        return linear.linear(x, cast, None if bias is None else bias.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        x, weight = ctx.saved_tensors
        needs = ctx.needs_input_grad
        if torch.is_grad_enabled() or not has_ops(grad.device):
            if weight is not None and torch.is_grad_enabled():
                weight = ctx.layer.differentiable_weight(weight, grad.dtype)
            return *_composed_grads(grad, x, weight, ctx.layer, needs[:3]), None
        flat = grad.reshape(-1, grad.shape[-1])
        x_grad = weight_grad = bias_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(flat, weight).view(*grad.shape[:-1], weight.shape[1])
        if needs[1]:
            weight_grad, bias_grad = ctx.layer.grads(flat, x.reshape(-1, x.shape[-1]), needs[1:3])
        elif needs[2]:
            bias_grad = flat.sum(0, dtype=torch.float32).to(ctx.layer.bias_dtype)
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
        ctx.layer = _Dtypes(weight.dtype, None if bias is None else bias.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        return _composed_grads(grad, x, weight.to(x.dtype), ctx.layer, ctx.needs_input_grad)


class _Dtypes:
    def __init__(self, weight_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
        self.weight_dtype, self.bias_dtype = weight_dtype, bias_dtype


def _refuse_double_backward(op: str) -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"[{op}] fused GELU has no second derivative (create_graph=True). Use torch.nn.functional.gelu "
            "after fusedamp.nn.functional.linear, or fusedamp.nn.fusions(gelu=False, gelu_grad=False)."
        )


class LinearGELU(torch.autograd.Function):
    """``gelu(F.linear(...), approximate="tanh")`` in one product."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, fuse_bias: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.layer = _Layer(weight, bias, fuse_bias)
        cast, flat = weight.to(x.dtype), x.reshape(-1, x.shape[-1])
        y, pre = linear.linear_gelu(flat, cast, None if bias is None else bias.to(x.dtype))
        ctx.save_for_backward(flat, cast, pre)
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None
        _refuse_double_backward("linear_gelu")
        x, weight, pre = ctx.saved_tensors
        needs = ctx.needs_input_grad
        inner = torch.ops.aten.gelu_backward(grad.reshape(pre.shape), pre, approximate="tanh")
        x_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(inner, weight).view(*grad.shape[:-1], weight.shape[1])
        return x_grad, *ctx.layer.grads(inner, x, needs[1:3]), None


class MLP(torch.autograd.Function):
    """Two linear layers with GELU between, whose gradient is made in the product that comes before it in
    backward."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w1: Tensor,
        b1: Tensor | None,
        w2: Tensor,
        b2: Tensor | None,
        fuse_gelu: bool,
        fuse_bias: bool,
    ) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.first, ctx.second = _Layer(w1, b1, fuse_bias), _Layer(w2, b2, fuse_bias)
        flat, dtype = x.reshape(-1, x.shape[-1]), x.dtype
        c1, c2 = w1.to(dtype), w2.to(dtype)
        d1, d2 = (None if b is None else b.to(dtype) for b in (b1, b2))
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
        needs = ctx.needs_input_grad
        flat = grad.reshape(-1, grad.shape[-1])
        second = ctx.second.grads(flat, hidden, needs[3:5])
        if not any(needs[:3]):
            return None, None, None, *second, None, None
        dtype = ctx.first.bias_dtype or torch.float32
        inner, sums = linear.linear_gelu_input_grad(flat, w2, pre, bias_grad=needs[2], bias_dtype=dtype)
        x_grad = None
        if needs[0]:
            x_grad = linear.linear_input_grad(inner, w1).view(*grad.shape[:-1], w1.shape[1])
        weight_grad, _ = ctx.first.grads(inner, x, (needs[1], False))
        return x_grad, weight_grad, sums if needs[2] else None, *second, None, None
