"""What the check of an optimizer's gradients found: by one op where these are plain and on one device, else
in parts, with operations of torch and reductions over ranks between them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.inputs import GradientTable
from ..tensors.addresses import grads_of
from .clip import clip_coefficient
from .gradients import Gradients, Stamp, lasting

Clip = tuple[float | Tensor, float]  # max_norm and norm_type


@dataclass(slots=True)
class Check:
    """What one look at plain gradients on the scale's device found. It holds while they are unwritten."""

    table: GradientTable
    found: ops.GradCheck
    scale: Tensor
    version: int  # of the scale
    clip: Clip | None
    mark: int = 0
    grads: list[Tensor] | None = None  # kept, so that no other tensor takes their place

    @property
    def clips(self) -> list[Clip]:
        return [] if self.clip is None else [self.clip]

    @property
    def clip_coef(self) -> Tensor | None:
        return None if self.clip is None else self.found.clip_coef

    def still_holds(self, optimizer: Any, scale: Tensor) -> bool:
        """Whether scale and gradients are those that were checked; looks at the latter."""
        return (
            scale is self.scale
            and scale._version == self.version
            and optimizer._look(True) is self.table
            and self.table.is_as_marked(self.mark)
        )


def check(optimizer: Any, scale: Tensor, clip: Clip | None, keep: bool) -> Check | None:
    """Check the gradients of ``optimizer``, with the coefficient for one clipping; None where they are not
    plain, where the optimizer has not yet made the same step twice, or without a kernel for ``clip``.

    ``keep``: so that :meth:`Check.still_holds` can be asked later.
    """
    if scale.is_inference():  # it has no version counter
        return None
    table = optimizer._look(keep)
    if table is None or table.device != scale.device:
        return None
    max_norm, norm_type = (torch.inf, 2.0) if clip is None else clip
    if isinstance(max_norm, Tensor) and (
        max_norm.device != scale.device or max_norm.dtype not in (torch.float32, torch.float64)
    ):
        return None
    grads = None
    if keep:
        found = grads_of([param for group in optimizer.param_groups for param in group["params"]])
        if found is None:
            return None
        grads = found[0]
    with lasting():
        result = ops.check_grads(table, scale, norm_type, max_norm)
    mark = table.mark() if keep else 0
    return Check(table, result, scale, scale._version, clip, mark, grads)


@dataclass(slots=True)
class CheckByParts:
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
