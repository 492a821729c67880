"""The ops that move the loss scale: by growth and backoff, or by the headroom of the gradients."""

import math
from functools import lru_cache
from typing import Any

from torch import Tensor

from . import checks
from .call import bump, call

_PLAIN = frozenset((bool, int, float))


def update_scale_(
    scale: Tensor,
    growth_tracker: Tensor,
    found_inf: Tensor,
    *,
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float = 0.0,
    max_scale: float = float("inf"),
    hysteresis_tracker: Tensor | None = None,
    hysteresis: int = 1,
    refill_on_good_step: bool = False,
) -> None:
    """The loss scale of the next iteration, in place. With the defaults exactly ``torch._amp_update_scale_``,
    except where the tracker has passed the interval already, which was lowered: the scale grows then, and
    torch's never does again.

    After an overflow (``found_inf`` is not 0) the scale is multiplied by ``backoff_factor``, but never
    brought below ``min_scale``; after ``growth_interval`` good iterations in a row it is multiplied by
    ``growth_factor``, but never brought above ``max_scale`` nor to infinity. With ``hysteresis`` h, the
    first h - 1 overflows are forgiven; the budget is refilled when the scale grows, or after any good
    iteration with ``refill_on_good_step``.

    Args:
        growth_factor, backoff_factor: not NaN. min_scale, max_scale: not NaN and not negative.
        growth_interval, hysteresis: whole numbers from 1 to 2^31 - 1, as the trackers are int32.
        scale (1 element, fp32): rewritten.
        growth_tracker (1 element, int32): good iterations in a row; rewritten.
        found_inf (1 element, fp32): read only.
        hysteresis_tracker (1 element, int32): what is left of the budget, ``hysteresis`` at first; rewritten.
    Raises: ValueError naming the argument, what it got, what it wanted.
    Cost: one element; no host sync.
    Source: arXiv:1710.03740, section 3.2.
    """
    rule = (
        growth_factor,
        backoff_factor,
        growth_interval,
        min_scale,
        max_scale,
        hysteresis,
        refill_on_good_step,
    )
    plain = _PLAIN.issuperset(map(type, rule))  # else a value may change in place
    checked = (_checked if plain else _checked.__wrapped__)(*rule)
    if hysteresis > 1 and hysteresis_tracker is None:
        raise ValueError(
            f"[update_scale_] hysteresis is {hysteresis}; expected a hysteresis_tracker (int32, 1 element) "
            "with it"
        )
    call("update_scale_", scale, growth_tracker, hysteresis_tracker, found_inf, **checked)
    bump([scale, growth_tracker], [] if hysteresis_tracker is None else [hysteresis_tracker])


HEADROOM_STATE = 584  # numbers in the state of update_scale_headroom_


def update_scale_headroom_(
    scale: Tensor,
    state: Tensor,
    found_inf: Tensor,
    largest: Tensor,
    *,
    headroom_bits: int = 2,
    growth_interval: int = 2000,
    min_scale: float = 0.0,
    max_scale: float = float("inf"),
) -> None:
    """The loss scale of the next iteration, in place, from the largest gradients of the last 512 good steps.

    The scale is a power of two, 2^k; any other is rounded down at its first update. After an overflow
    (``found_inf`` is not 0) k falls by 1, by 2 after the second in a row, and by 4 after each further one.
    After a good step k falls at once to ``want`` if it is above it, and rises by 1 if it was below for
    ``patience`` good steps::

        want = 15 - b - headroom_bits

    b is the largest floor(log2(magnitude)) of unscaled gradients that more than floor(2 n / 512) of the n
    kept steps reached; it is limited to -40..23. With k = ``want`` the gradients of such a step are below
    2^(16 - headroom_bits), and FP16 overflows at 2^16. 2 outliers in 512 steps don't lower the scale. A step
    whose gradients are all 0, or whose largest is unknown, is not kept; while none is kept, good steps leave
    the scale as it is.
    ``patience`` is 64 at first. It doubles, up to ``growth_interval``, at the first overflow in a row, and
    halves, down to 64, after ``growth_interval`` good steps in a row.

    Args:
        scale (1 element, fp32): rewritten. 0, a negative number or NaN counts as ``min_scale``, infinity as
            ``max_scale``; such a step is not kept.
        state (int32 [584]): zeros at first; rewritten. Its first four numbers are the overflows in a row (at
            most 3), the good steps in a row, those of them that waited to grow, and ``patience`` (0: 64).
            Then n, the place of the next entry, two zeros, how many entries have each of the 64 exponents
            from -40, and the 512 entries: exponents plus 40.
        found_inf (1 element, fp32): read only.
        largest (1 element, fp64): the largest magnitude of the step's gradients as stored, that is times the
            scale. Read only. 0, infinity, NaN: none is known.
        headroom_bits: a whole number from 0 to 14. growth_interval: from 1 to 2^31 - 1.
        min_scale, max_scale: not NaN and not negative; between them must be a power of two, and only those
            from 2^-126 to 2^127 are used. The scale always stays within them.
    Raises: ValueError naming the argument, what it got, what it wanted.
    Cost: one thread reads and writes about 80 numbers; no host sync.
    Source: scale and overflow as arXiv:1710.03740, section 3.2; the rule is fusedamp's own.
    """
    rule = (headroom_bits, growth_interval, min_scale, max_scale)
    plain = _PLAIN.issuperset(map(type, rule))
    checked = (_checked_headroom if plain else _checked_headroom.__wrapped__)(*rule)
    call("update_scale_headroom_", scale, state, found_inf, largest, **checked)
    bump([scale, state])


@lru_cache(typed=True)
def _checked(
    growth_factor: float,
    backoff_factor: float,
    growth_interval: int,
    min_scale: float,
    max_scale: float,
    hysteresis: int,
    refill_on_good_step: bool,
) -> dict[str, Any]:
    """The rule as the op takes it; a training loop gives the same one in each iteration."""
    where = "[update_scale_]"
    factors = _factors(
        where,
        growth_factor=growth_factor,
        backoff_factor=backoff_factor,
        min_scale=min_scale,
        max_scale=max_scale,
    )
    counts = _counts(where, growth_interval=growth_interval, hysteresis=hysteresis)
    refill = checks.flag(where, "refill_on_good_step", refill_on_good_step)
    return factors | counts | dict(refill_on_good_step=refill)


@lru_cache(typed=True)
def _checked_headroom(
    headroom_bits: int, growth_interval: int, min_scale: float, max_scale: float
) -> dict[str, Any]:
    where = "[update_scale_headroom_]"
    if not _is_whole(headroom_bits, 0, 14):
        checks.refuse(where, "headroom_bits", headroom_bits, "a whole number from 0 to 14")
    return (
        _factors(where, min_scale=min_scale, max_scale=max_scale)
        | _counts(where, growth_interval=growth_interval)
        | dict(headroom_bits=headroom_bits)
    )


def _factors(where: str, **values: Any) -> dict[str, Any]:
    factors = {name: checks.number(where, name, value) for name, value in values.items()}
    for name, number in factors.items():
        if math.isnan(number) or (name.endswith("_scale") and number < 0.0):
            wanted = "a number from 0 to inf" if name.endswith("_scale") else "a number"
            checks.refuse(where, name, number, wanted)
    return factors


def _counts(where: str, **values: Any) -> dict[str, Any]:
    for name, value in values.items():
        if not _is_whole(value, 1, checks.INT32_MAX):
            checks.refuse(where, name, value, "a whole number from 1 to 2**31 - 1")
    return values


def _is_whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
