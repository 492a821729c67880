"""The parameters of one op call."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ... import ops
from ...ops.observers import observer_of
from ...tensors.places import WHOLE
from .slot import Slot

Group = dict[str, Any]


@dataclass(slots=True)
class Batch:
    """The parameters of one op call: of one group, on one device, all with masters or all without."""

    group: Group
    state_names: tuple[str, ...]
    op: str
    scalars: dict[str, Any]
    slots: list[Slot] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)

    def call(self, squares: Tensor | None = None) -> ops.StepCall:
        """Return the op call that updates the parameters. ``squares``: norms over all ranks, of shards."""
        states = {f"{name}s": [s.states[i] for s in self.slots] for i, name in enumerate(self.state_names)}
        masters = [slot.master for slot in self.slots if slot.master is not None]
        params, steps = [slot.target for slot in self.slots], [slot.step for slot in self.slots]
        scales = [slot.scales[j] for j in range(len(self.slots[0].scales)) for slot in self.slots]
        seeds = [slot.seed for slot in self.slots] if self.slots[0].mode.is_random() else []
        is_sharded = any(slot.place is not WHOLE for slot in self.slots)
        places = [number for slot in self.slots for number in slot.place] if is_sharded else []
        return ops.StepCall(
            *(
                self.op,
                params,
                self.grads,
                masters,
                states,
                steps,
                self.scalars,
                scales,
                seeds,
                places,
                squares,
            )
        )

    def launch(self, optimizer: Any, squares: Tensor | None = None) -> None:
        call = self.call(squares)
        if (observer := observer_of(optimizer)) is not None:
            positions = _positions_of([slot.param for slot in self.slots], optimizer.param_groups)
            if (tally := observer.tally(call.params[0].device, positions)) is not None:
                call = call._replace(updates=tally.updates, due=tally.due)
        ops.step_lists(*call)
        for slot in self.slots:
            if slot.target is not slot.param:
                slot.finish()


def _positions_of(params: list[Tensor], groups: list[Group]) -> list[int]:
    """Return the positions of ``params`` among the parameters of all ``groups``."""
    everything = [param for group in groups for param in group["params"]]
    positions = {id(param): position for position, param in enumerate(everything)}
    return [positions[id(param)] for param in params]
