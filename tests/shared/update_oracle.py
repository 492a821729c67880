"""What the ``updates`` of a step op must be, typed a second time on torch's conversions.

A weight without a master is stepped once more as an FP32 one, whose value is not rounded. All rules are
elementwise in FP32, or measure the same values in the same order, so this is the value before rounding.
"""

import math
from dataclasses import replace
from typing import Any

import torch
from fusedamp.ops import recode
from op_calls import StepCall, bits, split_masters, step_call
from torch import Tensor

FORMATS: dict[str, dict[str, Any]] = {
    "float32": dict(dtypes=[torch.float32]),
    "float64": dict(dtypes=[torch.float64]),
    "float16": dict(dtypes=[torch.float16]),
    "bfloat16": dict(dtypes=[torch.bfloat16]),
    "stochastic": dict(dtypes=[torch.bfloat16, torch.float16], stochastic_rounding=True),
    "masters": dict(dtypes=[torch.float16, torch.bfloat16], masters=True),
    "FP32 gradients": dict(dtypes=[torch.float16, torch.bfloat16], masters=True, grad_dtype=torch.float32),
    "split": dict(dtypes=[torch.float16, torch.bfloat16], masters=True),
    "BF16 states": dict(dtypes=[torch.float16, torch.bfloat16, torch.float32], states=torch.bfloat16),
}


def call_in(form: str, variant: str, shapes: list[tuple[int, ...]], **options: Any) -> StepCall:
    """A random call in one of FORMATS, with small learning rates that 16-bit weights feel in part."""
    made = dict(FORMATS[form])
    states = made.pop("states", None)
    call = step_call(variant, shapes, made.pop("dtypes"), **(dict(lr=1e-3) | made | options))
    if states is not None:
        call.states = [[s.to(states) if s.dtype == torch.float32 else s for s in one] for one in call.states]
    if form == "split":
        pairs = [
            split_masters(master, param.dtype)
            for master, param in zip(call.masters, call.params, strict=True)
        ]
        call.params[:], call.masters[:] = [weight for weight, _ in pairs], [rest for _, rest in pairs]
    return call


def values(call: StepCall) -> list[Tensor]:
    """The FP32 (FP64) values of the parameters: masters, which follow modified weights, or the weights."""
    if call.masters:
        return [recode.master_of(p, m) for p, m in zip(call.params, call.masters, strict=True)]
    return [p.float() if p.element_size() == 2 else p.clone() for p in call.params]


def before_and_after(call: StepCall) -> tuple[list[Tensor], list[Tensor]]:
    """The values before a step and after it; of weights without masters, before they are rounded."""
    old, twin = values(call), call.clone()
    if not call.masters:
        twin = replace(twin, params=[value.clone() for value in old])
    twin.options = {k: v for k, v in twin.options.items() if k not in ("updates", "due")}
    twin.run()
    return old, values(twin)


def wanted(weight: Tensor, old: Tensor, new: Tensor) -> list[float]:
    """One row of ``updates``; ``weight`` as the step found it."""
    moved, lost = ~(new == old), torch.zeros(())
    if weight.element_size() == 2:
        total = weight.float() + (new - old)
        lost = moved & (bits(total.to(weight.dtype)) == bits(weight)) & ~total.isnan()
    change, start = (new - old).double().reshape(-1).tolist(), old.double().reshape(-1).tolist()
    return [float(moved.sum()), float(lost.sum()), _squares(change), _squares(start)]


def _squares(numbers: list[float]) -> float:
    if any(math.isnan(x) for x in numbers):
        return math.nan
    return math.inf if any(math.isinf(x) for x in numbers) else math.fsum(x * x for x in numbers)


def check(got: Tensor, call: StepCall, old: list[Tensor], new: list[Tensor]) -> None:
    """Counts equal; sums within the roundings of as many additions as there are elements, in any order."""
    for row, weight, a, b in zip(got.tolist(), call.params, old, new, strict=True):
        moved, lost, *sums = wanted(weight, a, b)
        assert row[:2] == [moved, lost], (weight.dtype, weight.shape, row, moved, lost)
        for found, exact in zip(row[2:], sums, strict=True):
            bound = (weight.numel() + 1) * 2.0**-53 * exact
            same = found == exact or (math.isnan(found) and math.isnan(exact))
            assert same or abs(found - exact) <= bound, (weight.dtype, weight.shape, found, exact)
