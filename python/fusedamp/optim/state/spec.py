"""Which states an optimizer keeps, and those of one parameter: shape, format, first value."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...tensors.layout import STATE_DTYPES
from .formats import (
    Entry,
    adapted,
    filled,
    has_master,
    keep_master,
    label,
    need_real,
    need_storable,
    numel_name,
    stored_dtype,
)
from .steps import as_step, check_step

Group = dict[str, Any]


@dataclass(frozen=True, eq=False)
class StateSpec:
    """One state that an optimizer may keep for a parameter, besides ``step`` and ``master``.

    Args:
        name: its key in the state; in the op's arguments it ends in s.
        like: makes a tensor of its shape, device and placement from the parameter, and the state is FP32 or
            FP64. None: it is like the parameter, in the format that the option ``state_dtype`` names.
        first: its value before the first step, or the option of the constructor that says it.
        nonnegative: whether it is never negative, so that 8 bits need no sign.
        required: whether a checkpoint must have it for every parameter that it knows.
        when: whether a group uses it; None: always.
        of: whether a parameter of a group can have it; None: each.
        count: the step count where a checkpoint has this state without one; None: there must be one.
        restarts: whether making it starts the step count anew.
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
    like: Tensor  # with its shape, device and placement
    dtype: torch.dtype  # int8 and uint8 have block scales beside them; of a master, int16 is a remainder
    first: float = 0.0
    restarts: bool = False


def resolved(
    specs: Iterable[StateSpec], param: Tensor, group: Group, defaults: dict[str, Any]
) -> list[State]:
    """The states that ``param`` has of ``specs``, and its master, as the options of ``group`` want them.

    ``defaults``: the options of the constructor. Raises: ValueError where a format doesn't fit ``param``.
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
    """Make what is missing in ``entry``, mend what doesn't fit, and drop an unwanted master.

    It pauses after each tensor, so that those of many parameters can be made round-robin.
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
    """:func:`completing`, at once."""
    for _ in completing(param, entry, states):
        pass
