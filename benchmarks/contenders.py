"""The two sides of a row: a full optimizer step as a user writes it, with fusedamp and with torch alone.

``phase()`` runs everything between ``backward`` and ``zero_grad``: unscale, overflow check, gradient
clipping, optimizer step, scale update, with the weights in their final dtype. Each side has its own weights
and states; the gradients are shared, and rewritten before each call, as by a backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import fusedamp
import torch
from fusedamp.optim.state.formats import Storage
from torch import Tensor
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_

from .rows import Rival

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
INIT_SCALE = 2.0**10
PLAIN = Storage()
ADAM: dict[str, Any] = dict(lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": ADAM,
    "adam": ADAM,
    "sgd": dict(lr=1.0, momentum=0.9, weight_decay=1e-4),
    "lion": dict(lr=1e-4, betas=(0.9, 0.99), weight_decay=0.1),
    "lamb": ADAM,
    "lars": dict(lr=1.0, momentum=0.9, weight_decay=1e-4),
}
NAMES = {"adamw": "AdamW", "adam": "Adam", "sgd": "SGD", "lion": "Lion", "lamb": "LAMB", "lars": "LARS"}


class Contender(Protocol):
    @property
    def scaler(self) -> torch.amp.GradScaler: ...

    @property
    def weights(self) -> Sequence[Tensor]: ...

    def phase(self) -> None:
        """Run one full optimizer step; this is timed."""

    def masters(self) -> list[Tensor]:
        """Return the FP32 weights."""


def _parameters(weights: list[Tensor], grads: list[Tensor]) -> list[Parameter]:
    params = [Parameter(weight) for weight in weights]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad
    return params


def _start(scaler: torch.amp.GradScaler, weights: list[Tensor]) -> None:
    scaler.scale(torch.zeros(1, device=weights[0].device))  # creates the scale, as the first loss does


class Fusedamp:
    def __init__(
        self,
        optimizer: str,
        weights: list[Tensor],
        grads: list[Tensor],
        max_norm: float,
        storage: Storage = PLAIN,
    ) -> None:
        self.weights = _parameters(weights, grads)
        options = {**OPTIONS[optimizer], **storage}
        self.optimizer = getattr(fusedamp.optim, NAMES[optimizer])(self.weights, **options)
        self.scaler = fusedamp.GradScaler(weights[0].device.type, init_scale=INIT_SCALE)
        _start(self.scaler, weights)
        self.max_norm = max_norm

    def phase(self) -> None:
        self.scaler.clip_grad_norm_(self.optimizer, self.max_norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def masters(self) -> list[Tensor]:
        return [self.optimizer.state[p].get("master", p.detach()) for p in self.weights]


class Torch:
    """P1, P2, P5, P6: FP32 weights. ``clip_grad_norm_`` gets ``foreach=True``, which is faster for many
    tensors."""

    def __init__(
        self, optimizer: str, weights: list[Tensor], grads: list[Tensor], max_norm: float, implementation: str
    ) -> None:
        self.weights = _parameters(weights, grads)
        choice = dict(fused=implementation == "fused", foreach=implementation in ("foreach", "compiled"))
        self.optimizer = getattr(torch.optim, NAMES[optimizer])(self.weights, **OPTIONS[optimizer], **choice)
        if implementation == "compiled":
            self.optimizer.step = torch.compile(self.optimizer.step)
        self.scaler = torch.amp.GradScaler(weights[0].device.type, init_scale=INIT_SCALE)
        _start(self.scaler, weights)
        self.max_norm = max_norm

    def phase(self) -> None:
        self.scaler.unscale_(self.optimizer)
        clip_grad_norm_(self.weights, self.max_norm, foreach=True)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def masters(self) -> list[Tensor]:
        return [p.detach() for p in self.weights]


class ByHand:
    """P3, P4: 16-bit weights and gradients with FP32 copies of both; the copies' memory is reused."""

    def __init__(
        self, optimizer: str, weights: list[Tensor], grads: list[Tensor], max_norm: float, implementation: str
    ) -> None:
        self.weights, self.grads = weights, grads
        self.master_grads = [torch.empty_like(grad, dtype=torch.float32) for grad in grads]
        masters = [weight.float() for weight in weights]
        self.inner = Torch(optimizer, masters, self.master_grads, max_norm, implementation)
        self.scaler = self.inner.scaler

    def phase(self) -> None:
        torch._foreach_copy_(self.master_grads, self.grads)
        self.inner.phase()
        torch._foreach_copy_(self.weights, self.masters())

    def masters(self) -> list[Tensor]:
        return self.inner.masters()


def torch_side(
    rival: Rival, optimizer: str, weights: list[Tensor], grads: list[Tensor], max_norm: float
) -> Contender:
    kind = ByHand if rival.by_hand else Torch
    return kind(optimizer, weights, grads, max_norm, rival.implementation)
