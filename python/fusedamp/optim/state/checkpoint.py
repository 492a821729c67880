"""Checkpoints: state stays FP32; torch would cast it to the parameter's dtype."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ...ops.checks import at
from ...tensors.layout import fitted, round_robin, scalar_like
from ...tensors.shards import is_distributed, is_flattened
from .encoded import Remainder, Scales, plain
from .foreign import FOREIGN_STATES, ignored_options, refuse_foreign
from .formats import DEFAULTS, adapted, check_master, master_values, name_dtypes
from .saved import (
    Entry,
    bits_from_checkpoint,
    for_checkpoint,
    label,
    numel_name,
    order_name,
    scale_name,
    taken_from_checkpoint,
)
from .sharded import is_quantized
from .spec import resolved
from .steps import as_step


class _Converted:
    """Wraps the converted state of one parameter: torch casts tensors, also in containers, but not this
    type."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry


@contextmanager
def plainly(optimizer: Any) -> Iterator[None]:
    """Make ``Optimizer.state_dict`` return plain tensors and options, also to the user's hooks."""
    for group in optimizer.param_groups:
        name_dtypes(group)
    hook = optimizer.register_state_dict_post_hook(_plain, prepend=True)
    try:
        yield
    finally:
        hook.remove()


def _plain(optimizer: Any, state_dict: dict[str, Any]) -> None:
    # The entries belong to the optimizer; the state dict needs its own copies.
    owners: dict[Any, Tensor] = {}
    in_8_bits: set[Any] = set()
    for group, saved in zip(optimizer.param_groups, state_dict["param_groups"], strict=True):
        owners |= dict(zip(saved["params"], group["params"], strict=True))
        if any(map(_is_fsdp1, group["params"])):
            saved["state_dtype"] = "float32"  # as _plain_entry() saves its states
        if saved["state_dtype"] == "int8":
            in_8_bits |= set(saved["params"])
    state_dict["state"] = {
        key: _plain_entry(entry, owners.get(key)) if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    for key in in_8_bits & state_dict["state"].keys():
        _mark_numbers(optimizer, state_dict["state"][key])


def _is_fsdp1(param: Tensor) -> bool:
    return is_flattened(param) and is_distributed()


def _mark_numbers(optimizer: Any, saved: Entry) -> None:
    """Give floats among 8-bit states a size of 0, by which :func:`_refuse_cast` knows them."""
    for spec in optimizer.states:
        value = saved.get(spec.name)
        if spec.like is None and isinstance(value, Tensor) and value.is_floating_point():
            saved[numel_name(spec.name)] = 0


def _plain_entry(entry: Entry, param: Tensor | None) -> Entry:
    saved = for_checkpoint(entry)
    if param is None or not _is_fsdp1(param):
        return saved
    # FSDP1 cuts and joins states by elements, in one dtype: numbers in FP32.
    for name in (name for name, value in entry.items() if isinstance(value, Scales)):
        del saved[name]
    for name, value in entry.items():
        if isinstance(value, Tensor) and not isinstance(value, Scales):
            if name == "master":
                saved[name] = master_values(entry, param)
            elif is_quantized(value) or value.dtype == torch.bfloat16:
                saved[name] = value.float()
            for known in (numel_name(name), order_name(name)):
                saved.pop(known, None)
    return saved


@contextmanager
def converting(optimizer: Any) -> Iterator[None]:
    """Make ``Optimizer.load_state_dict`` convert states as documented there.

    Runs as the last pre-hook and the first post-hook, so that the user's hooks see the same as in torch.
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
    refuse_foreign(where, state_dict)
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"{where} got a dict with keys {sorted(map(str, state_dict))}; expected 'state' and "
            "'param_groups'. Pass what an optimizer's state_dict() returned."
        )
    groups, saved_groups = optimizer.param_groups, state_dict["param_groups"]
    if [len(group["params"]) for group in groups] != [len(saved["params"]) for saved in saved_groups]:
        return None  # torch raises a ValueError that names it
    owners: dict[Any, tuple[Tensor, dict[str, Any], bool]] = {}
    converted_groups = []
    for g, (group, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        saved = dict(saved)
        name_dtypes(saved)
        _warn_of_rules(f"{where} group {g}:", type(optimizer).__name__, saved, group)
        # Storage options come from this optimizer, not from the checkpoint; missing options are kept.
        kept = {name: group[name] for name in DEFAULTS}
        if saved.get("rounding_seed") is not None:  # random numbers continue
            kept["rounding_seed"] = saved["rounding_seed"]
        converted = {**{name: group[name] for name in optimizer.defaults if name in group}, **saved, **kept}
        optimizer._check_group(f"{where} group {g}:", {**optimizer.defaults, **converted})
        converted_groups.append(converted)
        for index, param in zip(saved["params"], group["params"], strict=True):
            in_8_bits = saved.get("state_dtype") == "int8"
            owners[index] = (param, {**optimizer.defaults, **converted}, in_8_bits)
    state, makers = dict(state_dict["state"]), []
    dropped: dict[str, int] = {}
    for index, saved in state_dict["state"].items():
        if index in owners:
            entry = {name: value for name, value in saved.items() if value is not None}
            _drop_foreign(entry, dropped)
            makers.append(_converting(f"{where} state[{index!r}]", optimizer, entry, *owners[index]))
            state[index] = _Converted(entry)
    round_robin(makers)
    _warn_of_dropped(where, type(optimizer).__name__, dropped)
    return {**state_dict, "state": state, "param_groups": converted_groups}


def _warn_of_rules(where: str, optimizer: str, saved: dict[str, Any], group: dict[str, Any]) -> None:
    """Warn of the checkpoint's options that this optimizer does not have and that would change its steps."""
    ignored = ignored_options(saved, group)
    if ignored:
        warnings.warn(
            f"{where} the checkpoint has {', '.join(f'{k}={v!r}' for k, v in ignored.items())}, which "
            f"{optimizer} does not have: kept in the group and ignored by its steps. Set this optimizer's "
            "own options to the same effect.",
            stacklevel=7,  # the caller of load_state_dict
        )


def _drop_foreign(entry: Entry, dropped: dict[str, int]) -> None:
    """Remove other libraries' tensors from ``entry``, and count them by name. Entries of the user stay."""
    for name in FOREIGN_STATES & entry.keys():
        if isinstance(entry.pop(name), Tensor):
            dropped[name] = dropped.get(name, 0) + 1


def _warn_of_dropped(where: str, optimizer: str, dropped: dict[str, int]) -> None:
    if dropped:
        counts = ", ".join(f"{name!r} of {count} parameters" for name, count in dropped.items())
        warnings.warn(
            f"{where} the checkpoint has {counts}, which {optimizer} does not have: dropped. Masters start "
            "from the weights. To start from exact ones, save FP32 weights in the other library and put them "
            "into the checkpoint as 'master'.",
            stacklevel=7,  # the caller of load_state_dict
        )


def _converting(
    where: str, optimizer: Any, entry: Entry, param: Tensor, group: dict[str, Any], in_8_bits: bool
) -> Iterator[None]:
    """Convert the saved ``entry`` to the state of ``param``, in place, one tensor at a time."""
    with at(where):
        yield from _convert_tensors(optimizer, entry, param, group, in_8_bits)


def _convert_tensors(
    optimizer: Any, entry: Entry, param: Tensor, group: dict[str, Any], in_8_bits: bool
) -> Iterator[None]:
    optimizer._check_param(param, group)
    specs = [spec for spec in optimizer.states if spec.of is None or spec.of(param, group)]
    for spec in specs:
        value = entry.get(spec.name)
        if value is not None and spec.count is not None:
            entry.setdefault("step", spec.count)
        if isinstance(value, float) and spec.like is scalar_like:  # torch's NAdam before 2.0 saved a float
            entry[spec.name] = torch.tensor(value, dtype=torch.float64)
    required = [spec.name for spec in specs if spec.required]
    if any(spec.required and spec.count is None for spec in specs):
        required.insert(0, "step")
    missing = [name for name in required if entry and name not in entry]
    if missing:
        raise ValueError(
            f"has {sorted(entry)}, without {missing}; expected all of {required}. "
            "Load a checkpoint of this optimizer."
        )
    for spec in optimizer.states:
        taken_from_checkpoint(entry, spec.name, spec.nonnegative, param)
        scales = scale_name(spec.name)
        if scales in entry and not is_quantized(entry.get(spec.name)):
            dtype = getattr(entry.get(spec.name), "dtype", "missing")
            raise ValueError(
                f"has {scales!r}, the block scales of an 8-bit state, beside {spec.name!r} of dtype {dtype}; "
                "expected its int8 or uint8 values. Quantized values must not be cast or computed with: "
                'load the intact checkpoint into an optimizer with state_dtype="float32" for that.'
            )
        if spec.like is None:
            _refuse_cast(entry, spec.name, in_8_bits)
    bits_from_checkpoint(entry, param)
    present = [spec for spec in specs if spec.name in entry]
    states = {state.name: state for state in resolved(present, param, group, optimizer.defaults)}
    if "master" not in states:
        entry.pop("master", None)
    for name, value in list(entry.items()):
        if name not in entry:  # metadata of an 8-bit state that is converted to another format
            continue
        if name == "step":
            entry[name] = as_step(value, param)
        elif name == "master":  # its weight may be loaded later: the step converts it
            check_master(value, param)
            was_split = plain(value).dtype == torch.int16
            master = fitted(plain(value), param, torch.int16 if was_split else None)
            entry[name] = Remainder(master) if was_split and type(master) is Tensor else master
            label(entry, name)
        elif name in states:
            new = adapted(entry, name, states[name].like, states[name].dtype)
            entry[name] = _copied(new) if new is value else new
            label(entry, name)
        elif isinstance(value, Scales):  # copied with the state
            continue
        elif isinstance(value, Tensor):
            entry[name] = value.detach().to(param.device, copy=True)
        else:
            entry[name] = copy.deepcopy(value)
        yield


def _refuse_cast(entry: Entry, name: str, in_8_bits: bool) -> None:
    """Raise if the state ``name`` is a float and was saved in 8 bits: torch.distributed.checkpoint casts."""
    value = entry.get(name)
    if not isinstance(value, Tensor) or is_quantized(value):
        return
    numel = entry.pop(numel_name(name), None)
    if numel or (in_8_bits and numel is None):
        raise ValueError(
            f"has state {name!r} of dtype {value.dtype}, which was saved in 8 bits; expected its int8 or "
            "uint8 values and their block scales. torch.distributed.checkpoint casts quantized values to the "
            'states of the optimizer that loads: load into one with state_dtype="int8" and shards like those '
            "saved, or into unsharded parameters, and its state_dict() into this one. If the values are "
            f"numbers of your own, save {numel_name(name)!r} as 0."
        )


def _copied(state: Tensor) -> Tensor:
    """Copy ``state``, which needs no conversion."""
    if is_quantized(state):
        return state.clone()
    return fitted(state, state, state.dtype)


def _unwrap(optimizer: Any) -> None:
    for key, value in optimizer.state.items():
        if isinstance(value, _Converted):
            optimizer.state[key] = value.entry
