"""Steps made of torch's own operations, for rules that need norms or products of whole matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.recode import master_of
from ...tensors.layout import STATE_DTYPES
from ...tensors.shards import is_dtensor, need_whole
from .optimizer import Batch, FusedOptimizer, Group
from .slot import Slot

Values = dict[str, Tensor]


class ComposedOptimizer(FusedOptimizer):
    """A :class:`FusedOptimizer` whose step is a function of torch tensors instead of one op.

    It keeps what the op promises: gradients are read still scaled and never written, FP32 masters follow
    weights that were modified, a skipped step changes no bit, step counts are per parameter, and the host
    waits for nothing, so that a CUDA graph can capture it. New values are computed aside, in FP32 (FP64 for
    FP64 parameters), and selected on the device.
    """

    can_compress = False

    def _rule(
        self, group: Group, lr: float | Tensor, weight: Tensor, grad: Tensor, states: Values, step: Tensor
    ) -> tuple[Tensor, Values]:
        """The new weight and states of one parameter; must write none of its arguments.

        Args:
            lr: a number, or an FP64 tensor on the parameter's device.
            weight, grad, states: of one dtype, FP32 or FP64; the gradient is unscaled, clipped and negated.
            step: FP64, 0-d: how many steps there are with this one.
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
        """Nothing: only calls of one op can be made again from addresses."""

    def _check_calls(self, batches: list[Batch]) -> None:
        # Parameters are updated one after the other: none may read what an earlier one has written.
        ops.check_memory([_memory(batch) for batch in batches])

    def _launch(self, batch: Batch) -> None:
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
    """The FP32 step count after ``step``: one more, or from 2^24 on, where FP32 has no such number, the next
    that it has (csrc/math/count.h)."""
    following = step + 1
    above = torch.nextafter(step, torch.full_like(step, torch.inf))
    return torch.where(step < 2.0**62, torch.where(following > step, following, above), step)


def _memory(batch: Batch) -> ops.StepCall:
    """What an update of ``batch`` reads and writes; its parameters may have different states."""
    slots = batch.slots
    masters = [slot.master for slot in slots if slot.master is not None]
    states = {"states": [state for slot in slots for state in slot.states]}
    params, steps = [slot.target for slot in slots], [slot.step for slot in slots]
    return ops.StepCall(batch.op, params, batch.grads, masters, states, steps, batch.scalars)


def followed(slot: Slot) -> Tensor:
    """The value that the step starts from: the master, which follows its weight where that was modified."""
    weight, master = slot.target, slot.master
    if master is None:
        return weight.to(STATE_DTYPES[weight.dtype])
    return master_of(weight, master)


def _unscaled(grad: Tensor, scalars: dict[str, Any]) -> Tensor:
    """``grad * (inv_scale * clip_coef)``, negated to maximize; never ``grad`` itself."""
    factor = -1.0 if scalars["maximize"] else 1.0
    for name in ("inv_scale", "clip_coef"):
        if scalars[name] is not None:
            factor = scalars[name].reshape(()) * factor
    return grad * (factor.to(grad.dtype) if isinstance(factor, Tensor) else factor)
