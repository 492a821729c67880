"""How gradients of linear layers reach their parameters: in FP32 from the product, added in place where no
other code sees them on the way to ``.grad``.

torch's autograd casts a weight's gradient to the dtype of the product, 16 bits, before it adds it up. Here it
is returned in FP32, or added to the parameter's ``.grad`` inside the product.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import linear

_SKIP: Any = object()  # the running backward needs no gradient


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
    """True if AccumulateGrad of ``weight`` runs on the current stream, as far as Python can tell.

    It runs on the stream that was current when its node was made; the engine waits for other streams only for
    gradients that are returned.
    """
    if not weight.is_cuda:
        return True
    return torch.cuda.current_stream(weight.device) == torch.cuda.default_stream(weight.device)


def _accumulator(weight: Tensor | None, accumulate: Any) -> Any:
    """Return the tensor to add the gradient of ``weight`` to; None to return the gradient, ``_SKIP`` to make
    none.

    In place only if the engine accumulates into this leaf, in FP32, and no hook of the tensor would see the
    gradient. ``accumulate``: the node after this one, AccumulateGrad if the weight is a leaf.
    """
    if torch.compiler.is_compiling() or weight is None or not weight.is_leaf:
        return None  # a traced backward would record today's .grad
    if not weight.requires_grad:  # frozen since forward
        return _SKIP
    if torch.is_anomaly_enabled():  # it reads what is returned
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
        and grad.is_contiguous()
        and not grad.is_neg()  # a lazy negation, of complex numbers
    )
    return grad if plain and not weight._backward_hooks and _on_its_stream(weight) else None


class Layer(NamedTuple):
    """A weight and a bias as backward needs them."""

    weight: Tensor | None  # itself; None if gradients are always returned
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
            weight_grad, sums = linear.linear_weight_grad(grad, x, dtype=self.weight_dtype, bias_grad=fuse)
        elif into is not _SKIP:
            sums = linear.linear_weight_grad_(into, grad, x, bias_grad=fuse)
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
            x_grad = torch.matmul(grad, weight) if weight is not None and needs[0] else None
            weight_grad = bias_grad = None
            if x is not None and needs[1]:
                weight_grad = (grad.t().float() @ x.float()).to(self.weight_dtype)
            if needs[2]:
                bias_grad = grad.sum(0, dtype=torch.float32).to(self.bias_dtype)
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
    untracked = torch.compiler.is_compiling() or weight.is_inference()
    version = 0 if untracked else weight._version
    return Layer(weight, version, weight_dtype, bias_dtype, fuse_bias)
