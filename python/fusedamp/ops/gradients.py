"""Ops over gradients: unscaling and gradient checks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors import addresses
from . import checks
from .call import bump, call


class GradStats(NamedTuple):
    """Results of a gradient check of n tensors. All are on the gradients' device."""

    found_inf: Tensor
    """float32, 0-dim: 1 if an element is not finite before or after unscaling, else 0."""
    total: Tensor
    """float64, 0-dim: the sum of ``|g * inv_scale|^p`` over all tensors (p = inf: the maximum; p = 0: how
    many are not 0)."""
    per_tensor: Tensor
    """float64, [n]: the same for each tensor."""
    counts: Tensor
    """int64, [n, 3]: elements that are infinite, that are NaN, and that are finite but overflow when
    unscaled."""


class Numerics(NamedTuple):
    """What :func:`grad_numerics` writes, and the flag that it reads. All are on the gradients' device."""

    extremes: Tensor
    """float64, [n, 3]: the largest ``|s|``, zeros, elements with 0 < ``|s|`` < 2^-14."""
    histogram: Tensor
    """int64, [n, 64]: elements in each bin."""
    due: Tensor
    """int32, one element: 0 leaves the histogram untouched."""


class GradCheck(NamedTuple):
    """What the check of n gradients on one device concludes. 0-d tensors on that device, but for counts."""

    inv_scale: Tensor
    """float32: 1 / scale."""
    clip_coef: Tensor
    """float32: min(1, max_norm / (norm + 1e-6))."""
    found_inf: Tensor
    """float32: 1 if an element is not finite before or after unscaling, else 0."""
    norm: Tensor
    """float32, or float64 if a gradient is: of the unscaled gradients."""
    counts: Tensor
    """int64, [n, 3]: as in :class:`GradStats`."""
    per_tensor: Tensor | None = None
    """float64, [n]: as in :class:`GradStats`; only of a check with numerics."""


def check_grads(
    fields: Tensor,
    has_float64: bool,
    scale: Tensor,
    norm_type: float,
    max_norm: float | Tensor,
    numerics: Numerics | None = None,
) -> GradCheck:
    """Check gradients whose addresses were just read: :func:`grad_stats`, norm and clip coefficient.

    Args:
        fields (int64, [3, n]): from ``addresses.rows``. has_float64: whether a gradient is fp64.
        scale (1 element, fp32): the loss scale, on the gradients' device.
        norm_type: the p of the norm, 0 to inf.
        max_norm: a number, or 1 element (fp32|fp64) on the same device.
        numerics: rewritten as by :func:`grad_numerics`, of the gradients before unscaling; where it is not
            due, of the extremes only the largest is valid.
    Cost: reads each gradient once; one op, no host sync.
    """
    tensor = max_norm if isinstance(max_norm, Tensor) else None
    number = 0.0 if tensor is not None else checks.number("[check_grads]", "max_norm", max_norm)
    if numerics is None:
        run = torch.ops.fusedamp._check_grads.default
        return GradCheck(*run(fields, scale, norm_type, number, tensor, has_float64))
    found = call("_check_numerics", fields, *numerics, scale, norm_type, number, tensor, has_float64)
    bump(numerics[:2])
    return GradCheck(*found)


def squares(fields: Tensor, inv_scale: Tensor) -> Tensor:
    """Return the sum of squares of each gradient times ``inv_scale``: float64, [n]. ``fields``: as in
    :func:`check_grads`. Cost: reads each gradient once; no host sync."""
    per_tensor: Tensor = torch.ops.fusedamp._packed_grad_stats.default(fields, inv_scale, inv_scale, 2.0)[2]
    return per_tensor


def unscale_(grads: Sequence[Tensor], inv_scale: Tensor, found_inf: Tensor) -> None:
    """Multiplies every gradient by ``inv_scale`` in place, and sets ``found_inf`` to 1 if anything is not
    finite.

    Args:
        grads (list of tensors, any shape, fp16|bf16|fp32|fp64): rewritten; arithmetic in fp32 (fp64 for
            fp64), rounded to nearest even.
        inv_scale (1 element, fp32): 1 / loss scale.
        found_inf (1 element, fp32): set to 1 if an element is not finite before, or after as it is stored;
            else untouched.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: reads and writes each gradient once; no host sync.
    Source: arXiv:1710.03740, section 3.2.
    """
    checks.need_lists("unscale_", grads=grads)
    if not grads:
        return
    call("unscale_", grads, inv_scale, found_inf)
    bump(grads, [found_inf])


def grad_stats(
    grads: Sequence[Tensor],
    inv_scale: Tensor | None = None,
    norm_type: float = 2.0,
) -> GradStats:
    """Check that gradients are finite before and after unscaling; norms and counts of all and each.

    The norm is ``total ** (1 / norm_type)`` (for inf: ``total``). The check is made in fp32 (fp64 for fp64
    gradients). Results are deterministic and do not depend on the number of threads or on the instruction
    set.

    Args:
        grads (list of tensors, any shape, fp16|bf16|fp32|fp64, at least one): read only.
        inv_scale (1 element, fp32): 1 / loss scale; None stands for 1.
        norm_type: the p of the norm, 0 to inf.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: reads each gradient once; no host sync.
    """
    return _grad_stats(grads, inv_scale, norm_type)


def _grad_stats(
    grads: Sequence[Tensor],
    inv_scale: Tensor | None,
    norm_type: float,
    fields: addresses.Fields | None = None,
    numerics: Numerics | None = None,
    lean: bool = False,
    only_due: bool = False,
) -> GradStats:
    """:func:`grad_stats`, or with ``numerics`` :func:`grad_numerics`. ``fields``: what
    ``addresses.read(grads)`` returned just now, to spare reading them again; addresses, which can not be
    checked. Where numerics are not due: ``lean``: only the largest of the
    extremes is needed; ``only_due``: nothing is, and results may be undefined."""
    op = "grad_stats" if numerics is None else "grad_numerics"
    checks.need_lists(op, grads=grads)
    if not grads:
        raise ValueError(f"[{op}] grads is empty; expected at least one tensor")
    norm_type = checks.number(f"[{op}]", "norm_type", norm_type)
    if not norm_type >= 0.0:
        checks.refuse(f"[{op}]", "norm_type", norm_type, "a number from 0 to inf")
    if fields is None:
        fields = addresses.read(grads)
    if numerics is None:
        if fields is not None:
            return GradStats(*call(f"_packed_{op}", addresses.rows(fields), grads[0], inv_scale, norm_type))
        return GradStats(*call(op, grads, inv_scale, norm_type))
    if fields is not None:
        rows = addresses.rows(fields)
        found = call(f"_packed_{op}", rows, grads[0], *numerics, inv_scale, norm_type, lean, only_due)
    else:
        found = call(op, grads, *numerics, inv_scale=inv_scale, norm_type=norm_type)
    bump(numerics[:2])
    return GradStats(*found)
