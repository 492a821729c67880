"""Linear layers: ``nn.Linear`` with gradients that are not rounded to 16 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._compile import _disable_dynamo

from ..ops import checks
from . import functional


class Linear(nn.Linear):
    """Apply ``input @ weight.T + bias``: an ``nn.Linear`` whose weight gradient keeps FP32.

    The weights decide which gradients you get:

    - FP32 under autocast to FP16 or BF16: FP32, added to ``.grad`` from the product. Works with DDP, FSDP2,
      ``torch.compile``, checkpointing and any optimizer.
    - FP16 or BF16: 16 bits, as torch. Works everywhere.
    - FP16 or BF16 with ``grad_dtype=torch.float32``: FP32 in an FP32 ``.grad``. Works in one process in eager
      mode, with ``fusedamp.optim`` and ``GradScaler``.
    - FP32 or FP64 without autocast: torch's. Works everywhere.

    Limits of 16-bit weights with FP32 gradients (torch 2.11 to 2.14): torch's Adam and its relatives, fused
    optimizers, DDP and compiled autograd raise; FSDP2 drops torch's attribute ``grad_dtype``, so gradients
    have 16 bits; in a compiled model the layer runs outside of the graph, and ``fullgraph=True`` raises.

    ``torch.ao.quantization`` knows ``nn.Linear`` alone, and ``torch.jit.script`` cannot compile this class:
    load the weights into the original model for these.

    Args:
        in_features, out_features, bias, device, dtype: as for ``nn.Linear``. Same keys, same initial values.
        grad_dtype: None, or ``torch.float32`` for FP32 gradients of 16-bit parameters. FP32 parameters have
            them anyway.
    Shape: [..., in_features] to [..., out_features].
    Raises: ValueError, TypeError naming the argument. Inputs are checked as in
        :func:`fusedamp.nn.functional.linear`.
    Cost: see :func:`fusedamp.nn.functional.linear`.
    """

    grad_dtype: torch.dtype | None = None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        where = type(self).__name__
        need_grad_dtype(where, grad_dtype)
        need_dtype(where, dtype)
        in_features = need_size(where, "in_features", in_features)
        out_features = need_size(where, "out_features", out_features)
        super().__init__(in_features, out_features, bias, device, dtype)
        self.grad_dtype = grad_dtype
        set_grad_dtype(self)

    def forward(self, input: Tensor) -> Tensor:
        set_grad_dtype(self)
        return functional.linear(input, self.weight, self.bias)

    def extra_repr(self) -> str:
        text = super().extra_repr()
        return text if self.grad_dtype is None else f"{text}, grad_dtype={self.grad_dtype}"


class LinearGELU(Linear):
    """Apply :class:`Linear` and ``GELU(approximate="tanh")``, in one product where that is faster.

    An ``nn.Linear`` with its keys, so that a checkpoint of ``nn.Sequential(nn.Linear, nn.GELU)`` loads.
    Arguments, modes and limits are those of :class:`Linear`; see :func:`fusedamp.nn.functional.linear_gelu`.
    """

    def forward(self, input: Tensor) -> Tensor:
        set_grad_dtype(self)
        return functional.linear_gelu(input, self.weight, self.bias)


def need_grad_dtype(where: str, grad_dtype: Any) -> None:
    if grad_dtype is not None and grad_dtype is not torch.float32:
        kind = ValueError if isinstance(grad_dtype, torch.dtype) else TypeError
        raise kind(
            f"[{where}] grad_dtype is {grad_dtype!r}; expected torch.float32 or None. Pass one of them."
        )


def need_size(where: str, name: str, value: Any) -> int:
    return checks.count(f"[{where}]", name, value, "a number of features", low=0)


def need_dtype(where: str, dtype: Any) -> None:
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"[{where}] dtype is {dtype!r}; expected a floating-point torch.dtype or None.")


def set_grad_dtype(module: Linear) -> None:
    """Set torch's ``grad_dtype`` of 16-bit parameters: copies and pickles of tensors lose it."""
    if module.grad_dtype is not None:
        need_grad_dtype(type(module).__name__, module.grad_dtype)
        _set_grad_dtype(module)


@_disable_dynamo
def _set_grad_dtype(module: Linear) -> None:
    for parameter in need_float32_grads(type(module).__name__, module, module.grad_dtype):
        if parameter.grad_dtype is not module.grad_dtype:
            parameter.grad_dtype = module.grad_dtype


def need_float32_grads(where: str, module: nn.Module, grad_dtype: torch.dtype | None) -> list[nn.Parameter]:
    """Return the 16-bit parameters of a layer; raise if one cannot have gradients of ``grad_dtype``."""
    found = []
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in (torch.float16, torch.bfloat16) or not parameter.is_leaf:
            continue
        if type(parameter) not in (nn.Parameter, Tensor):
            raise RuntimeError(
                f"[{where}] {name} is a {type(parameter).__name__}; expected a plain tensor, as "
                f"grad_dtype={grad_dtype}. Keep its weights in FP32 and run under autocast."
            )
        if parameter.grad is not None and parameter.grad.dtype is not grad_dtype:
            raise RuntimeError(
                f"[{where}] {name}.grad is {parameter.grad.dtype}; expected {grad_dtype} or None, as "
                f"grad_dtype={grad_dtype}. Call zero_grad() first."
            )
        found.append(parameter)
    return found
