"""Results of the gradient check (finite check and norm): one op for plain gradients on one device, otherwise
several torch operations and reductions over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.inputs import GradientTable
from ..ops.observers import Reader
from ..tensors.addresses import grads_of
from .clip import clip_coefficient
from .flags import lasting
from .gradients import Gradients, Stamp


class Clip(NamedTuple):
    """One clipping by the total norm."""

    max_norm: float | Tensor
    norm_type: float
    process_group: Any = None


@dataclass(slots=True)
class Check:
    """Result of checking plain gradients on the scale's device with one op; valid until one is modified."""

    table: GradientTable
    found: ops.GradCheck
    scale: Tensor
    version: int  # of the scale
    clip: Clip | None
    mark: int = 0
    grads: list[Tensor] | None = None  # kept alive, so that their addresses are not reused

    @property
    def clips(self) -> list[Clip]:
        return [] if self.clip is None else [self.clip]

    @property
    def clip_coef(self) -> Tensor | None:
        return None if self.clip is None else self.found.clip_coef

    def still_holds(self, optimizer: Any, scale: Tensor) -> bool:
        """True if scale and gradients are unmodified since the check; reads the gradients' versions."""
        return (
            scale is self.scale
            and scale._version == self.version
            and optimizer._gradient_table(True) is self.table
            and self.table.is_as_marked(self.mark)
        )


def check(
    optimizer: Any, scale: Tensor, clip: Clip | None, keep: bool, reader: Reader | None
) -> Check | None:
    """Check the gradients of ``optimizer`` and compute the coefficient of one clipping. Returns None if a
    gradient is not plain, if the optimizer has not made the same step twice in a row, or if no kernel
    supports ``clip``.

    ``keep``: record what :meth:`Check.still_holds` needs later.
    """
    if scale.is_inference():  # it has no version counter
        return None
    table = optimizer._gradient_table(keep)
    if table is None or table.device != scale.device:
        return None
    max_norm, norm_type, _ = clip or Clip(torch.inf, 2.0)
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
    numerics = None if reader is None else reader.numerics(table.device, table.positions)
    with lasting():
        result = ops.check_grads(table.fields, table.has_float64, scale, norm_type, max_norm, numerics)
        if reader is not None:
            reader.checked(table.device, lambda: _squares(table, result, norm_type))
    mark = table.mark() if keep else 0
    return Check(table, result, scale, scale._version, clip, mark, grads)


def _squares(table: GradientTable, found: ops.GradCheck, norm_type: float) -> Tensor:
    """Return the sums of squares of each gradient; another norm has not computed them."""
    if norm_type == 2.0:
        assert found.per_tensor is not None
        return found.per_tensor
    return ops.squares(table.fields, found.inv_scale)


@dataclass(slots=True)
class CheckByParts:
    """Result of checking scaled gradients with several operations, and the clipping that the step will
    apply."""

    gradients: Gradients
    stats: dict[torch.device, ops.GradStats]
    inv_scale: Tensor
    norm_type: float
    stamp: Stamp  # of the scale and of the gradients
    clips: list[Clip] = field(default_factory=list)
    clip_coef: Tensor | None = None  # FP64

    def clip(self, clip: Clip) -> Tensor:
        """Add one deferred clipping; returns the norm after the earlier ones."""
        device = self.inv_scale.device
        norm = self.gradients.norm(self.stats, clip.norm_type, device, clip.process_group, self.clip_coef)
        clip_coef = clip_coefficient(norm, clip.max_norm)
        self.clip_coef = clip_coef if self.clip_coef is None else self.clip_coef * clip_coef
        self.clips.append(clip)
        return norm.to(self.gradients.widest)
