"""Records from the rings of a watch that have arrived on the host."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..amp.overflow import named
from .record import Record
from .rings import Fetch, Rows

_Part = tuple[Rows, Tensor, Tensor, Tensor]  # rows, and one slot of their rings


def names_of(optimizer: Optimizer, model: Any) -> list[str]:
    """Return the name of each parameter of ``optimizer``, by position: the model's, else the optimizer's."""
    names = [name for name, _ in named(optimizer)]
    if model is None:
        return names
    of_model = {id(param): name for name, param in model.named_parameters(remove_duplicate=False)}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    return [of_model.get(id(param), name) for param, name in zip(params, names, strict=True)]


def assembled(fetch: Fetch, names: list[str]) -> list[Record]:
    """Return the records in ``fetch``, oldest first."""
    by_step: dict[int, list[_Part]] = {}
    for rows, (steps, numbers, bins) in zip(fetch.rows, fetch.tensors, strict=True):
        for slot, (step, scale, *_) in enumerate(steps.tolist()):
            if step > 0 and not math.isfinite(scale):
                warnings.warn(
                    f"[Watch] the loss scale of step {int(step)} is {scale}; expected a finite number. This "
                    "step has no record. Set another scale by the scaler's update(new_scale).",
                    stacklevel=4,
                )
            elif step > 0 and (rows.positions or rows.names):
                by_step.setdefault(int(step), []).append((rows, steps[slot], numbers[slot], bins[slot]))
    return [_record(step, by_step[step], names) for step in sorted(by_step)]


def _record(step: int, parts: list[_Part], names: list[str]) -> Record:
    """Return the record of one step: its parameters in the optimizer's order, then activations."""
    order, labels = [], []
    for rows, *_ in parts:
        is_activation = bool(rows.names)
        for position in rows.positions:
            order.append((is_activation, position))
            known = rows.names or names
            labels.append(known[position] if position < len(known) else f"parameter {position}")
    by_place = sorted(range(len(order)), key=order.__getitem__)
    places = torch.tensor(by_place, dtype=torch.int64, device="cpu")
    numbers = torch.cat([numbers for _, _, numbers, _ in parts])[places]
    histogram = torch.cat([bins for *_, bins in parts])[places]
    states = [state.tolist() for _, state, _, _ in parts]
    skipped = any(state[2] != 0 for state in states)
    updates = [state[3] != 0 for (rows, *_), state in zip(parts, states, strict=True) if not rows.names]
    has_updates = bool(updates) and all(updates) and not skipped
    columns = numbers.T.contiguous()
    return Record(
        step=step,
        scale=states[0][1],
        skipped=skipped,
        names=tuple(labels[place] for place in by_place),
        numel=histogram.sum(1),
        histogram=histogram,
        largest=columns[0],
        norm=columns[1].sqrt(),
        moved=columns[2].long() if has_updates else None,
        lost=columns[3].long() if has_updates else None,
        update_norm=columns[4].sqrt() if has_updates else None,
        weight_norm=columns[5].sqrt() if has_updates else None,
    )
