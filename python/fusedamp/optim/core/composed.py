"""Optimizer steps composed of torch operations, for rules that need norms or matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.recode import master_of
from ...tensors.layout import STATE_DTYPES
from ...tensors.shards import is_dtensor, need_whole
from .batch import Batch, Group
from .optimizer import FusedOptimizer
from .slot import Slot

Values = dict[str, Tensor]


class ComposedOptimizer(FusedOptimizer):
    """Base class of optimizers whose step is composed of torch operations instead of one op.

    The guarantees are those of the ops: gradients are read scaled and never modified, FP32 masters are
    updated to match modified weights, a skipped step changes no bit, step counts are per parameter, and there
    is no host sync, so a CUDA graph can capture the step. New values are computed out of place in FP32 (FP64
    for FP64 parameters) and selected on the device.
    """

    can_compress = False

    def _rule(
        self, group: Group, lr: float | Tensor, weight: Tensor, grad: Tensor, states: Values, step: Tensor
    ) -> tuple[Tensor, Values]:
        """Return the new weight and states of one parameter; must not modify its arguments.

        Args:
            lr: a number, or an FP64 tensor on the parameter's device.
            weight, grad, states: of one dtype, FP32 or FP64; the gradient is unscaled, clipped and negated.
            step: FP64, 0-d: the number of steps including this one.
        """
        raise NotImplementedError

    def _check_param(self, param: Tensor, group: Group) -> None:
        super()._check_param(param, group)
        need_whole(param, type(self).__name__)
        if param.is_complex() or is_dtensor(param):
            kind = "a DTensor" if is_dtensor(param) else "complex"
            raise ValueError(
                f"of shape {list(param.shape)} is {kind}; {type(self).__name__} expected real, unsharded "
                "parameters. Give it to another optimizer, such as AdamW."
            )

    def _remember(self, batches: list[Batch]) -> None:
        """Do nothing: plans support only steps of one op."""

    def _check_calls(self, batches: list[Batch]) -> None:
        # Parameters are updated sequentially: none may read memory that an earlier one wrote.
        ops.check_memory([_memory(batch) for batch in batches])

    def _launch(self, batches: list[Batch]) -> None:
        for batch in batches:
            for slot, grad in zip(batch.slots, batch.grads, strict=True):
                self._update(batch.group, batch.scalars, slot, grad)

    def _update(self, group: Group, scalars: dict[str, Any], slot: Slot, grad: Tensor) -> None:
        found_inf, lr = scalars["found_inf"], scalars["lr_tensor"]
        lr = scalars["lr"] if lr is None else lr.double().reshape(())
        weight = followed(slot)
        states = dict(zip(slot.names, slot.states, strict=True))
        step = next_count(slot.step)
        grad = _unscaled(grad.to(weight.dtype), scalars)
        new_weight, new_states = self._rule(group, lr, weight, grad, states, step.double())
        written = [(slot.target, new_weight.to(slot.target.dtype)), (slot.step, step)]
        written += [(states[name], value) for name, value in new_states.items()]
        if slot.master is not None:
            written.append((slot.master, new_weight))
        for old, new in written:
            old.copy_(new if found_inf is None else torch.where(found_inf.reshape(()) != 0, old, new))
        if slot.target is not slot.param:
            slot.finish()


def next_count(step: Tensor) -> Tensor:
    """Return the FP32 step count after ``step``: one more, or from 2^24 the next FP32 number
    (csrc/math/count.h)."""
    following = step + 1
    above = torch.nextafter(step, torch.full_like(step, torch.inf))
    return torch.where(step < 2.0**62, torch.where(following > step, following, above), step)


def _memory(batch: Batch) -> ops.StepCall:
    """Return the memory that an update of ``batch`` reads and writes; parameters may have different
    states."""
    slots = batch.slots
    masters = [slot.master for slot in slots if slot.master is not None]
    states = {"states": [state for slot in slots for state in slot.states]}
    params, steps = [slot.target for slot in slots], [slot.step for slot in slots]
    return ops.StepCall(batch.op, params, batch.grads, masters, states, steps, batch.scalars)


def followed(slot: Slot) -> Tensor:
    """Return the step's initial value: the master, or the weight if it was modified."""
    weight, master = slot.target, slot.master
    if master is None:
        return weight.to(STATE_DTYPES[weight.dtype])
    return master_of(weight, master)


def _unscaled(grad: Tensor, scalars: dict[str, Any]) -> Tensor:
    """Return ``grad * (inv_scale * clip_coef)``, negated to maximize, as a new tensor."""
    factor = -1.0 if scalars["maximize"] else 1.0
    for name in ("inv_scale", "clip_coef"):
        if scalars[name] is not None:
            factor = scalars[name].reshape(()) * factor
    return grad * (factor.to(grad.dtype) if isinstance(factor, Tensor) else factor)
