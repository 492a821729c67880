"""Optimizer steps composed of torch operations, for rules that need norms or matrix products."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...ops.recode import master_of
from ...tensors.blocks import split_over
from ...tensors.exchange import add_up_
from ...tensors.layout import STATE_DTYPES, gradient_of
from ...tensors.shards import is_dtensor, need_whole
from .batch import Batch, Group
from .optimizer import FusedOptimizer
from .slot import Slot

Values = dict[str, Tensor]


class Update:
    """The update of one parameter, or of this rank's shard of it. Values are FP32 (FP64 for FP64 parameters).

    Attributes:
        group, param: of the optimizer.
        split_over: the mesh dimensions that split the parameter; empty if this rank has all of it.
        weight, grad, states: as before the step; the gradient is unscaled, clipped and negated to maximize.
        lr: a number, or an FP64 tensor on the parameter's device.
        count: FP64, 0-d: the number of steps including this one.
    """

    weight: Tensor
    grad: Tensor
    states: Values
    lr: float | Tensor
    count: Tensor

    def __init__(self, batch: Batch, slot: Slot, grad: Tensor) -> None:
        self.group, self.param, self.split_over = batch.group, slot.param, split_over(slot.param)
        self._slot, self._grad, self._scalars = slot, grad, batch.scalars
        found_inf = batch.scalars["found_inf"]
        self._is_skipped = None if found_inf is None else found_inf.reshape(()) != 0

    def skip_if(self, condition: Tensor) -> None:
        """Change nothing if ``condition`` (0-d, boolean) is true."""
        skipped = self._is_skipped
        self._is_skipped = condition if skipped is None else skipped | condition

    def start(self) -> None:
        """Compute the attributes."""
        slot, lr = self._slot, self._scalars["lr_tensor"]
        self.lr = self._scalars["lr"] if lr is None else lr.double().reshape(())
        self.weight = followed(slot)
        self.states = dict(zip(slot.names, slot.states, strict=True))
        self._step = next_count(slot.step)
        self.count = self._step.double()
        self.grad = _unscaled(self._grad.to(self.weight.dtype), self._scalars)

    def finish(self, weight: Tensor, states: Values) -> None:
        """Write the new ``weight`` and ``states``, unless the step is skipped."""
        slot, skipped = self._slot, self._is_skipped
        written = [(slot.target, weight.to(slot.target.dtype)), (slot.step, self._step)]
        written += [(self.states[name], value) for name, value in states.items()]
        if slot.master is not None:
            written.append((slot.master, weight))
        for old, new in written:
            old.copy_(new if skipped is None else torch.where(skipped, old, new))
        if slot.target is not slot.param:
            slot.finish()
        del self.weight, self.grad  # updates may wait for each other


class ComposedOptimizer(FusedOptimizer):
    """Base class of optimizers whose step is composed of torch operations instead of one op.

    The guarantees are those of the ops: gradients are read scaled and never modified, FP32 masters are
    updated to match modified weights, a skipped step changes no bit, step counts are per parameter, and there
    is no host sync, so a CUDA graph can capture the step. New values are computed out of place in FP32 (FP64
    for FP64 parameters) and selected on the device.

    Sharded DTensors need collectives, which all ranks must issue alike. So those that require a gradient take
    part in every step: on a rank without a gradient as if it were zeros, and if no rank has one, nothing
    changes.
    """

    can_compress = False

    def _run(self, updates: list[Update]) -> None:
        """Start and finish ``updates``: of one parameter, or of all that are split over ranks."""
        raise NotImplementedError

    def _is_joint(self, param: Tensor, group: Group) -> bool:
        return bool(split_over(param))

    def _takes_part(self, param: Tensor, group: Group) -> bool:
        return super()._takes_part(param, group) or (param.requires_grad and self._is_joint(param, group))

    def _check_param(self, param: Tensor, group: Group) -> None:
        super()._check_param(param, group)
        name = type(self).__name__
        need_whole(param, name)
        if param.is_complex():
            raise ValueError(
                f"of shape {list(param.shape)} is complex; {name} expected real parameters. Give it to "
                "another optimizer, such as AdamW."
            )
        placements = param.placements if is_dtensor(param) else ()  # type: ignore[attr-defined]
        if not all(p.is_replicate() or hasattr(p, "dim") for p in placements):
            raise ValueError(
                f"of shape {list(param.shape)} is a DTensor with placements {placements}; {name} expected "
                "Shard or Replicate. Redistribute it."
            )

    def _remember(self, batches: list[Batch]) -> None:
        """Do nothing: plans support only steps of one op."""

    def _check_calls(self, batches: list[Batch]) -> None:
        # Parameters are updated sequentially: none may read memory that an earlier one wrote.
        ops.check_memory([_memory(batch) for batch in batches])

    def _launch(self, batches: list[Batch]) -> None:
        split: dict[int, Update] = {}
        for batch in batches:
            for slot, grad in zip(batch.slots, batch.grads, strict=True):
                update = Update(batch, slot, grad)
                if update.split_over:
                    split[id(slot.param)] = update
                else:
                    self._run([update])
        if split:  # in the order of the groups, which is the same on all ranks
            params = [param for group in self.param_groups for param in group["params"]]
            updates = [split[id(param)] for param in params if id(param) in split]
            _skip_without_gradients(updates)
            self._run(updates)


def _skip_without_gradients(updates: list[Update]) -> None:
    """Let parameters for which no rank has a gradient stay as they are; collective."""
    counts = [
        torch.full((), float(gradient_of(update.param) is not None), device=update._slot.step.device)
        for update in updates
    ]
    add_up_((count, update.split_over) for count, update in zip(counts, updates, strict=True))
    for count, update in zip(counts, updates, strict=True):
        update.skip_if(count == 0)


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
