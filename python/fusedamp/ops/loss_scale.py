"""The op that grows the loss scale and backs it off."""

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
    factors = dict(
        growth_factor=growth_factor, backoff_factor=backoff_factor, min_scale=min_scale, max_scale=max_scale
    )
    factors = {name: checks.number(where, name, value) for name, value in factors.items()}
    for name, number in factors.items():
        if math.isnan(number) or (name.endswith("_scale") and number < 0.0):
            wanted = "a number from 0 to inf" if name.endswith("_scale") else "a number"
            checks.refuse(where, name, number, wanted)
    for name, value in dict(growth_interval=growth_interval, hysteresis=hysteresis).items():
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value < 2**31:
            checks.refuse(where, name, value, "a whole number from 1 to 2**31 - 1")
    refill = checks.flag(where, "refill_on_good_step", refill_on_good_step)
    return factors | dict(growth_interval=growth_interval, hysteresis=hysteresis, refill_on_good_step=refill)
