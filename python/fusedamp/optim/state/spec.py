"""Specification of an optimizer's states, and resolution for one parameter: shape, format, initial value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tensors.layout import STATE_DTYPES
from .formats import adapted, filled, has_master, keep_master, need_real, need_storable, stored_dtype
from .saved import Entry, label, numel_name
from .steps import as_step, check_step

Group = dict[str, Any]


@dataclass(frozen=True, eq=False)
class StateSpec:
    """One state that an optimizer may have per parameter, besides ``step`` and ``master``.

    Args:
        name: its key in the state; the op's argument has an s appended.
        like: function from the parameter to a tensor with the state's shape, device and placement; the state
            is FP32 or FP64. None: like the parameter, in the format of the option ``state_dtype``.
        first: its initial value, or the name of the constructor's option for it.
        nonnegative: whether it is never negative, so that its 8-bit format needs no sign.
        required: whether a checkpoint must have it for every parameter with state.
        when: predicate of a group that uses it; None: always.
        of: predicate of parameter and group that can have it; None: all.
        count: the step count if a checkpoint has this state without one; None: a count is required.
        restarts: whether creating it resets the step count.
    """

    name: str
    like: Callable[[Tensor], Tensor] | None = None
    first: float | str = 0.0
    nonnegative: bool = False
    required: bool = False
    when: Callable[[Group], Any] | None = None
    of: Callable[[Tensor, Group], bool] | None = None
    count: float | None = None
    restarts: bool = False


class State(NamedTuple):
    """One state of one parameter, or its master."""

    name: str
    like: Tensor  # template: shape, device and placement
    dtype: torch.dtype  # int8 and uint8 have block scales; an int16 master is a remainder
    first: float = 0.0
    restarts: bool = False


def resolved(
    specs: Iterable[StateSpec], param: Tensor, group: Group, defaults: dict[str, Any]
) -> list[State]:
    """Return the states of ``param`` according to ``specs``, and its master, for the options of ``group``.

    ``defaults``: the options of the constructor. Raises: ValueError if ``param`` does not support a format.
    """
    states = []
    for spec in specs:
        if spec.of is not None and not spec.of(param, group):
            continue
        if spec.like is None:
            need_storable(param, group["state_dtype"])
            like, dtype = param, stored_dtype(param.dtype, group["state_dtype"], spec.nonnegative)
        else:
            like = spec.like(param)
            dtype = STATE_DTYPES[like.dtype]
        first = defaults[spec.first] if isinstance(spec.first, str) else spec.first
        states.append(State(spec.name, like, dtype, first, spec.restarts))
    need_real(param, group)
    if has_master(param, group["master_weights"]):
        split = group["master_weights"] == "split"
        states.append(State("master", param, torch.int16 if split else STATE_DTYPES[param.dtype]))
    return states


def completing(param: Tensor, entry: Entry, states: list[State]) -> Iterator[None]:
    """Create what is missing in ``entry``, convert what does not fit, and remove an unwanted master.

    Yields after each tensor, so that the tensors of many parameters can be created round-robin.
    """
    needed = {"step", *(state.name for state in states)}
    if param.is_cuda and not needed <= entry.keys() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            "has no optimizer state yet; expected it before graph capture, as a replay would reset it. "
            "Run one step before capturing."
        )
    step = entry.get("step", 0.0)
    if (
        not isinstance(step, Tensor)
        or step.dtype != torch.float32
        or step.dim()
        or step.device != param.device
    ):
        entry["step"] = as_step(step, param)
    else:
        check_step(step)
    yield
    for name, like, dtype, first, restarts in states:
        if name == "master":
            keep_master(entry, param, dtype)
        elif entry.get(name) is not None:
            entry[name] = adapted(entry, name, like, dtype)
        else:
            if restarts:  # in place: processes may share the count
                entry["step"].zero_()
            entry[name] = filled(like, dtype, first)
        label(entry, name)
        yield
    if "master" not in needed:
        entry.pop("master", None)
        entry.pop(numel_name("master"), None)


def complete(param: Tensor, entry: Entry, states: list[State]) -> None:
    """Run :func:`completing` to the end."""
    for _ in completing(param, entry, states):
        pass
