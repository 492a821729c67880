"""Clip by the total norm: immediately for any gradients, or as a coefficient for a fused step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from types import GeneratorType
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import checks
from ..ops.inputs import refuse_freed, stepping_in_backward
from ..tensors.addresses import rows
from ..tensors.shards import local, need_no_replicas, refuse_flattened
from .flags import on
from .gradients import Gradients
from .limits import need_group


def check_norm(op: str, max_norm: float | Tensor, norm_type: float) -> float:
    """Check both arguments; returns the norm type as a float. Does not read a ``max_norm`` tensor (no
    sync)."""
    if type(max_norm) is type(norm_type) is float and max_norm >= 0 and norm_type >= 0:
        return norm_type  # as in nearly all calls
    where = f"[{op}]"
    checks.need_number(where, "max_norm", max_norm)
    if not isinstance(max_norm, Tensor) and not checks.number(where, "max_norm", max_norm) >= 0:
        checks.refuse(where, "max_norm", max_norm, "a number >= 0 (inf only measures the norm)")
    if isinstance(norm_type, str):  # torch takes "inf", too
        norm_type = float(norm_type)
    norm_type = checks.number(where, "norm_type", norm_type)
    if not norm_type >= 0:
        checks.refuse(where, "norm_type", norm_type, "a number >= 0, or inf for the largest element")
    return norm_type


def clip_coefficient(norm: Tensor, max_norm: float | Tensor) -> Tensor:
    """Return min(1, max_norm / (norm + 1e-6)) as torch does: 0-d, FP64, on ``norm``'s device; no sync."""
    if isinstance(max_norm, Tensor):
        max_norm = on(max_norm.detach(), norm.device).double().reshape(())
    else:
        max_norm = checks.number("[clip_grad_norm_]", "max_norm", max_norm)
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)


def check_ranks(op: str, params: list[Tensor], process_group: Any) -> None:
    """Raise if the norm over all ranks cannot be known."""
    if process_group is None:
        refuse_flattened(op, params)
    else:
        need_no_replicas(op, params)


@torch.no_grad()
def clip_grad_norm_(
    parameters: Tensor | Iterable[Tensor],
    max_norm: float | Tensor,
    norm_type: float = 2.0,
    error_if_nonfinite: bool = False,
    foreach: bool | None = None,
    *,
    process_group: Any = None,
) -> Tensor:
    """Clip gradients by their total norm: a drop-in for ``torch.nn.utils.clip_grad_norm_``. Gradients may
    have different dtypes, devices and shardings.

    Args:
        parameters: one parameter or an iterable; those without a gradient are skipped. Gradients are
            multiplied in place by ``min(1, max_norm / (total_norm + 1e-6))``.
        max_norm: a number, or a tensor of 1 element, which is read on the device (torch's function syncs the
            host).
        norm_type: p of the p-norm, >= 0; ``inf`` is the largest magnitude, 0 counts the nonzero elements.
        error_if_nonfinite: raise a RuntimeError, before any gradient changes, if the norm is inf or NaN. Only
            this option syncs the host.
        foreach: accepted for compatibility; all tensors of a device always go in one call.
        process_group: the ranks that together hold the model, if they hold different parameters: pipeline
            stages, experts, FSDP1 shards. The norm is over all of them, and each must call this function.
            A DTensor on a mesh with all these ranks counts once; plain parameters count on every rank, so
            leave out copies. None: this rank's parameters, and the other shards of DTensors.

    Returns: the norm before clipping, over all ranks that hold shards: 0-d, on the device of the first
        gradient, FP32 (FP64 if any gradient is FP64). Accumulation is in FP64, so FP16 gradients cannot
        overflow it.
    Raises: ValueError for a negative or NaN ``max_norm`` or ``norm_type``; TypeError if either is not a
        number, or is a tensor of several elements. RuntimeError for what ``process_group`` must tell: FSDP1
        shards on several ranks, DTensors whose meshes have different ranks.
    Cost: one read of the gradients and one read and write; 8 bytes per reduction over ranks.
    """
    if isinstance(parameters, Tensor):
        parameters = [parameters]
    else:
        empty_generator = isinstance(parameters, GeneratorType)
        parameters = list(parameters)
        if empty_generator and not parameters:
            warnings.warn(
                "`parameters` is an empty generator, no gradient clipping will occur.", stacklevel=3
            )
    norm_type = check_norm("clip_grad_norm_", max_norm, norm_type)
    need_group("clip_grad_norm_", process_group)
    check_ranks("clip_grad_norm_", parameters, process_group)
    if stepping_in_backward:
        refuse_freed("clip_grad_norm_", parameters)
    gradients = Gradients(parameters)
    home = next(iter(gradients.by_device), None)
    if process_group is None:
        gradients.need_known_ranks("clip_grad_norm_")
        if home is None:
            return torch.tensor(0.0)
    elif home is None:  # this rank joins the reduction, as the others wait for it
        home = local(parameters[0]).device if parameters else torch.device("cpu")
    if (
        process_group is None
        and not error_if_nonfinite
        and (norm := _clip_at_once(gradients, max_norm, norm_type)) is not None
    ):
        return norm
    read = Gradients(parameters, magnitudes=True) if norm_type != 2 else gradients
    norm = read.norm(read.stats(None, norm_type), norm_type, home, process_group)
    if error_if_nonfinite and not math.isfinite(norm.item()):
        raise RuntimeError(
            f"The total norm of order {norm_type} for gradients from "
            "`parameters` is non-finite, so it cannot be clipped. To disable "
            "this error and scale the gradients by the non-finite norm anyway, "
            "set `error_if_nonfinite=False`"
        )
    gradients.multiply_(clip_coefficient(norm, max_norm))
    return norm.to(gradients.widest)


def _clip_at_once(gradients: Gradients, max_norm: float | Tensor, norm_type: float) -> Tensor | None:
    """Clip plain FP32 and 16-bit gradients on one device by two ops; None for any others."""
    (device, bucket), *others = gradients.by_device.items()
    if others or bucket.fields is None or bucket.has_float64():
        return None
    if isinstance(max_norm, Tensor) and (
        max_norm.device != device or max_norm.dtype not in (torch.float32, torch.float64)
    ):
        return None
    one = torch.ones((), dtype=torch.float32, device=device)
    found = ops.check_grads(rows(bucket.fields), False, one, norm_type, max_norm)
    ops.unscale_(bucket.tensors, found.clip_coef, one)
    return found.norm
