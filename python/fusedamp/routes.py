"""How GradScaler.step drives which optimizer."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.optim import Optimizer

from . import ops
from .clip import clip_coefficient
from .gradients import Gradients, Stamp


@dataclass(slots=True)
class ReadPass:
    """What one read of an optimizer's still scaled gradients found, and how its step shall clip them."""

    gradients: Gradients
    stats: dict[torch.device, ops.GradStats]
    inv_scale: Tensor
    norm_type: float
    stamp: Stamp  # of the scale and of the gradients
    clips: list[tuple[float | Tensor, float]] = field(default_factory=list)
    clip_coef: Tensor | None = None  # FP64

    def clip(self, max_norm: float | Tensor, norm_type: float) -> Tensor:
        """Put off one more clipping, and return the norm that it finds after the earlier ones."""
        norm = self.gradients.norm(self.stats, norm_type, self.inv_scale.device)
        if self.clip_coef is not None and norm_type != 0:
            norm = norm * self.clip_coef
        clip_coef = clip_coefficient(norm, max_norm)
        self.clip_coef = clip_coef if self.clip_coef is None else self.clip_coef * clip_coef
        self.clips.append((max_norm, norm_type))
        return norm.to(self.gradients.widest)


def is_ours(optimizer: Optimizer) -> bool:
    """Whether to hand the scale, the clip coefficient and the flag to ``optimizer.step``.

    Asked of the type: a wrapper that forwards attributes is not the optimizer. A ``step`` that somebody put
    on the instance (Accelerate does) counts its calls, so it must not be called for a skipped step; but LR
    schedulers put a mere counter around the original.
    """
    if not getattr(type(optimizer), "_fusedamp_fused", False):
        return False
    original, step = type(optimizer).step, vars(optimizer).get("step")
    if step is None or getattr(step, "__func__", None) is original:
        return True
    return getattr(step, "_wrapped_by_lr_sched", False) and inspect.unwrap(step) is inspect.unwrap(original)


def takes_found_inf(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` itself skips where its attribute ``found_inf`` says so, as torch's fused
    ones do.
    """
    return getattr(optimizer, "_step_supports_amp_scaling", False) and not _would_start_momentum(optimizer)


def is_legacy(optimizer: Optimizer) -> bool:
    """Whether ``optimizer.step`` takes the scaler itself, which torch has deprecated but still does."""
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and "grad_scaler" in inspect.signature(optimizer.step).parameters
    )


def _would_start_momentum(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] != 0
        and param.grad is not None
        and optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for param in group["params"]
    )
