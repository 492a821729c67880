"""The op that tells what gradients are like, in the pass that checks them."""

from collections.abc import Sequence

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
