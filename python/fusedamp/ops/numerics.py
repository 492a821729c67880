"""Ops that count gradients by magnitude, and keep the counts of a step."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .gradients import GradStats, Numerics, _grad_stats


def grad_numerics(
    grads: Sequence[Tensor],
    extremes: Tensor,
    histogram: Tensor,
    due: Tensor,
    *,
    inv_scale: Tensor | None = None,
    norm_type: float = 2.0,
) -> GradStats:
    """Check gradients as :func:`grad_stats` does, and count their elements by magnitude.

    Counted are elements s as they are stored, before ``inv_scale``. Counts are exact, and equal on the CPU
    and on CUDA. An element is in bin 0 if it is 0 or -0; in bin 1 if 0 < ``|s|`` < 2^-40; in bin e + 42 for
    e = floor(log2 ``|s|``) from -40 to 19; in bin 62 if it is finite and 2^20 or more; in bin 63 if it is
    infinite or NaN. 2^-14 is FP16's least normal number.

    Args:
        grads (list of n tensors, any shape, fp16|bf16|fp32|fp64, at least one): read only.
        extremes (contiguous [n, 3], fp64): rewritten with the largest ``|s|`` of each gradient (inf if an
            element is not finite, 0 if there is none), the zeros, and the elements with 0 < ``|s|`` < 2^-14.
        histogram (contiguous [n, 64], int64): rewritten with the elements in each bin where ``due`` is not
            0, else untouched.
        due (1 element, int32): read on the gradients' device, so it may come from a computation there.
        inv_scale (1 element, fp32): 1 / loss scale; None stands for 1.
        norm_type: the p of the norm, 0 to inf.
    Returns: what :func:`grad_stats` returns, with the same bits.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: reads each gradient once, and again from the cache for a histogram; no host sync.
    Source: the 2^-14 below which FP16 loses bits: arXiv:1710.03740, section 3.2.
    """
    return _grad_stats(grads, inv_scale, norm_type, numerics=Numerics(extremes, histogram, due))


def record(
    clock: tuple[Tensor, Tensor],
    rings: tuple[Tensor, Tensor, Tensor],
    trajectory: Tensor | None,
    numerics: Numerics,
    squares: Tensor,
    **more: Any,
) -> None:
    """Write the counts of a step into rings on the device (csrc/engine/table.h, StepRecord).

    Args:
        clock: int64 [2] and int32 []: the number of the step, and whether it is due.
        rings: fp64 [history, 4] and [history, n, 6], int64 [history, n, 64].
        trajectory (fp64 [steps, 4]): of all steps.
        numerics, squares: of the gradient check.
        more: ``every``, ``updates`` of the step, ``scale``, ``found_inf``, ``only_due``, ``advance``.
    Cost: of a due step, 568 bytes per tensor; no host sync.
    """
    run = torch.ops.fusedamp._record_.default
    run(*clock, *rings, trajectory, numerics.extremes, numerics.histogram, squares, **more)
