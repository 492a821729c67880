"""Checkpoints: state stays FP32, where torch would cast it to the parameter's dtype."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .layout import STATE_DTYPES, fitted, in_turns
from .slot import as_step
from .storage import DEFAULTS, check_shape, has_master, keep, need_storable, scale_name, stored_dtype

if TYPE_CHECKING:
    from .base import FusedOptimizer


class _Converted:
    """The finished state of one parameter. Torch casts tensors, in containers too; this it leaves alone."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry


@contextmanager
def converting(optimizer: FusedOptimizer) -> Iterator[None]:
    """Within it ``Optimizer.load_state_dict`` converts states our way.

    It works as the last pre-hook and the first post-hook, so that the user's hooks see what torch shows.
    """
    before = optimizer.register_load_state_dict_pre_hook(_convert)
    after = optimizer.register_load_state_dict_post_hook(_unwrap, prepend=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()


def _convert(optimizer: Any, state_dict: dict[str, Any]) -> dict[str, Any] | None:
    where = f"[{type(optimizer).__name__}.load_state_dict]"
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"{where} got a dict with keys {sorted(map(str, state_dict))}; expected 'state' and "
            "'param_groups'. Pass what an optimizer's state_dict() returned."
        )
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(saved["params"]) for saved in saved_groups]:
        return None  # torch raises a ValueError that says which
    owners: dict[Any, tuple[Tensor, dict[str, Any]]] = {}
    converted_groups = []
    for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        # How masters and states are kept is the present optimizer's choice, not the checkpoint's.
        converted_groups.append({**saved, **{name: group[name] for name in DEFAULTS}})
        optimizer._check_group(f"{where} group {g}:", {**optimizer.defaults, **converted_groups[-1]})
        for index, param in zip(saved["params"], group["params"], strict=True):
            owners[index] = (param, {**optimizer.defaults, **converted_groups[-1]})
    state, makers = dict(state_dict["state"]), []
    for index, saved in state_dict["state"].items():
        if index in owners:
            entry = {name: value for name, value in saved.items() if value is not None}
            makers.append(_converting(f"{where} state[{index!r}]", optimizer, entry, *owners[index]))
            state[index] = _Converted(entry)
    in_turns(makers)
    return {**state_dict, "state": state, "param_groups": converted_groups}


def _converting(
    where: str, optimizer: FusedOptimizer, entry: dict[str, Any], param: Tensor, group: dict[str, Any]
) -> Iterator[None]:
    """Makes the saved ``entry`` that of ``param``, in place and one tensor at a time."""
    try:
        yield from _convert_tensors(optimizer, entry, param, group)
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where} {error}") from error


def _convert_tensors(
    optimizer: FusedOptimizer, entry: dict[str, Any], param: Tensor, group: dict[str, Any]
) -> Iterator[None]:
    optimizer._upgrade_state(entry)
    likes = {name: optimizer._like(name, param, group) for name in optimizer.state_names}
    required = [name for name in optimizer.required_state if likes.get(name, param) is not None]
    missing = [name for name in required if entry and name not in entry]
    if missing:
        raise ValueError(
            f"has {sorted(entry)}, without {missing}; expected all of {required}. "
            "Load the checkpoint of an optimizer of this kind."
        )
    if not has_master(param, group["master_weights"]):
        entry.pop("master", None)
    scales = {scale_name(name) for name, like in likes.items() if like is not None}
    for name, value in list(entry.items()):
        if name == "step":
            entry[name] = as_step(value, param)
        elif name == "master":  # split or whole: its weight may come later, and then the step converts it
            check_shape(name, value, param)
            entry[name] = fitted(value, param, torch.int16 if value.dtype == torch.int16 else None)
        elif (like := likes.get(name)) is not None:
            check_shape(name, value, like)
            entry[name] = fitted(value, value, value.dtype)
            dtype = STATE_DTYPES[like.dtype]
            if like is param:
                need_storable(param, group["state_dtype"])
                dtype = stored_dtype(param.dtype, group["state_dtype"], name in optimizer.nonnegative_states)
            keep(entry, name, like, dtype)
        elif name in scales:
            if name in entry and entry[name] is value:  # of a state that came as it is; others have new ones
                entry[name] = value.detach().to(param.device, copy=True)
        elif isinstance(value, Tensor):
            entry[name] = value.detach().to(param.device, copy=True)
        else:
            entry[name] = copy.deepcopy(value)
        yield


def _unwrap(optimizer: Any) -> None:
    for key, value in optimizer.state.items():
        if isinstance(value, _Converted):
            optimizer.state[key] = value.entry
