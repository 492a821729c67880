"""The feed-forward block of a transformer."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from . import functional
from .arguments import need_activation
from .layers import Linear, need_size, set_grad_dtype


class MLP(nn.Module):
    """Apply two :class:`fusedamp.nn.Linear` with an activation between them.

    The keys are ``fc1.*`` and ``fc2.*``. Where a fusion is the default (:func:`fusedamp.nn.fusions`), GELU
    and its gradient run inside the products. If ``fc1`` or ``fc2`` has hooks or was replaced (LoRA,
    sharding), the two modules are called one after the other.

    Args:
        in_features, hidden_features: sizes. out_features: ``in_features`` by default.
        bias, device, dtype, grad_dtype: of both layers, as for :class:`fusedamp.nn.Linear`.
        activation: "gelu_tanh" (the tanh approximation) or "relu".
    Shape: [..., in_features] to [..., out_features].
    Raises: ValueError, TypeError naming the argument.
    Cost: see :func:`fusedamp.nn.functional.mlp`.
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int,
        out_features: int | None = None,
        bias: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        activation: str = "gelu_tanh",
        grad_dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = activation
        hidden_features = need_size("MLP", "hidden_features", hidden_features)
        out_features = in_features if out_features is None else need_size("MLP", "out_features", out_features)
        options: dict[str, Any] = {"device": device, "dtype": dtype, "grad_dtype": grad_dtype}
        self.fc1 = Linear(in_features, hidden_features, bias, **options)
        self.fc2 = Linear(hidden_features, out_features, bias, **options)

    @property
    def activation(self) -> str:
        """ "gelu_tanh" or "relu"; may be set."""
        return self._activation

    @activation.setter
    def activation(self, name: str) -> None:
        need_activation("MLP", name)
        self._activation = name

    def forward(self, x: Tensor) -> Tensor:
        if self.activation == "gelu_tanh" and _is_untouched(self.fc1) and _is_untouched(self.fc2):
            set_grad_dtype(self.fc1)
            set_grad_dtype(self.fc2)
            return functional.mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias)
        hidden = self.fc1(x)
        hidden = F.relu(hidden) if self.activation == "relu" else F.gelu(hidden, approximate="tanh")
        output: Tensor = self.fc2(hidden)
        return output

    def extra_repr(self) -> str:
        return f"activation={self.activation!r}"


def _is_untouched(module: nn.Module) -> bool:
    """True if calling ``module`` runs its own forward and nothing else."""
    return (
        type(module) is Linear
        and "forward" not in vars(module)
        and module._compiled_call_impl is None
        and not has_hooks(module)
        and not torch_module._has_any_global_hook()  # type: ignore[no-untyped-call]
    )


def has_hooks(module: nn.Module) -> bool:
    """True if a hook sees the input, the output or their gradients."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
