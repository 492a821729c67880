"""How the masters and states of one parameter are kept between steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypedDict

import torch
from torch import Tensor

from ..sharding import local
from .layout import STATE_DTYPES, fits, fitted, memory_like
from .recoding import SCALE_BLOCK, dequantized, followed, joined, quantized, rounded_away, split

Entry = dict[str, Any]  # optimizer.state[param]
CODES = (torch.int8, torch.uint8)  # of signed states, and of those that are never negative


class Storage(TypedDict, total=False):
    """The options that say how masters and states are kept; every optimizer has them."""

    master_weights: str
    state_dtype: torch.dtype | str
    stochastic_rounding: bool


DEFAULTS = Storage(master_weights="auto", state_dtype=torch.float32, stochastic_rounding=False)


def with_storage(optimizer: str, defaults: Entry, storage: Storage) -> Entry:
    """``defaults`` with the options of storage, those given and the others."""
    unknown = sorted(storage.keys() - DEFAULTS.keys())
    if unknown:
        raise TypeError(f"{optimizer}() got an unexpected keyword argument {unknown[0]!r}")
    return {**defaults, **{k: defaults.get(k, v) for k, v in DEFAULTS.items()}, **storage, "rounding_seed": 0}


def spelled_out(init: Callable[..., None]) -> inspect.Signature:
    """The signature of a constructor with each option of storage in the place of ``**storage``."""
    _, *parameters = inspect.signature(init).parameters.values()
    if parameters and parameters[-1].kind is inspect.Parameter.VAR_KEYWORD:
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters[-1:] = [inspect.Parameter(name, kind, default=value) for name, value in DEFAULTS.items()]
    return inspect.Signature(parameters)


def scale_name(state: str) -> str:
    """The key of the block scales of an 8-bit state."""
    return f"{state}_scale"


def stored_dtype(param_dtype: torch.dtype, state_dtype: torch.dtype | str, nonnegative: bool) -> torch.dtype:
    """The dtype of a state of a parameter, under an option ``state_dtype`` that fits the parameter."""
    if state_dtype == "int8":
        return CODES[nonnegative]
    return STATE_DTYPES[param_dtype] if state_dtype == torch.float32 else torch.bfloat16


def has_master(param: Tensor, master_weights: str) -> bool:
    """Whether ``param`` keeps a master: 16-bit parameters do, unless told not to."""
    return master_weights != "none" and STATE_DTYPES.get(param.dtype, param.dtype) != param.dtype


def need_storable(param: Tensor, state_dtype: torch.dtype | str) -> None:
    """Raise unless the states of ``param`` can be kept as the option ``state_dtype`` says."""
    if state_dtype == torch.float32:
        return
    kind = f"is {str(param.dtype).removeprefix('torch.')} of shape {list(param.shape)}"
    if STATE_DTYPES[param.dtype] != torch.float32:
        raise ValueError(
            f"{kind} in a group with state_dtype {state_dtype!r}; expected float16, bfloat16 or float32. Put "
            "it into a group of its own with state_dtype=torch.float32, which means the wide type for it."
        )
    if state_dtype == "int8" and local(param) is not param:
        raise ValueError(
            f"{kind}, a DTensor, in a group with state_dtype 'int8'; expected a plain tensor, as block "
            "scales belong to a shard's memory and could not be resharded. Use state_dtype=torch.bfloat16."
        )


def keep(entry: Entry, name: str, like: Tensor, dtype: torch.dtype) -> None:
    """Bring the state ``name`` of ``entry`` into the layout of ``like`` and into ``dtype``."""
    value, scales = entry[name], entry.get(scale_name(name))
    if fits(value, like, dtype) and (dtype not in CODES or _are_scales(scales, like)):
        if dtype not in CODES:
            entry.pop(scale_name(name), None)
        return
    check_shape(name, value, like)
    if value.dtype in CODES:
        if not isinstance(scales, Tensor) or scales.numel() != -(-value.numel() // SCALE_BLOCK):
            raise ValueError(
                f"has 8-bit state {name!r} without the scales of its blocks, {scale_name(name)!r}; expected "
                "both. Pass what state_dict() returned, or clear optimizer.state."
            )
        if value.dtype == dtype and value.stride() == torch.empty_like(like, device="meta").stride():
            entry[name] = fitted(value, like, dtype)
            entry[scale_name(name)] = scales.detach().to(like.device, torch.float32, copy=True)
            return
        value = dequantized(value, scales.float())
    if dtype in CODES:
        entry[name], entry[scale_name(name)] = quantized(fitted(value, like), dtype)
    else:
        entry[name] = fitted(value, like, dtype)
        entry.pop(scale_name(name), None)


def _are_scales(scales: object, like: Tensor) -> bool:
    return (
        isinstance(scales, Tensor)
        and scales.dtype == torch.float32
        and scales.device == like.device
        and scales.shape == (-(-like.numel() // SCALE_BLOCK),)
        and scales.is_contiguous()
    )


def keep_master(entry: Entry, param: Tensor, master_weights: str) -> None:
    """Make the master of ``param``, or bring it into the form that ``master_weights`` names.

    A master whose rounding is not its weight follows the weight, which was modified (csrc/math/follow.h).
    """
    is_split = master_weights == "split"
    dtype = torch.int16 if is_split else STATE_DTYPES[param.dtype]
    value = entry.get("master")
    if value is None:
        entry["master"] = memory_like(param, dtype).zero_() if is_split else fitted(param, param)
        return
    if fits(value, param, dtype):
        return
    check_shape("master", value, param)
    was_split = value.dtype == torch.int16
    value = fitted(value, param, torch.int16 if was_split else None)
    source = local(param)
    if is_split and not was_split:
        master = local(value)
        kept = followed(master, source)
        if source.dtype == torch.bfloat16:
            kept = torch.where(rounded_away(master) == source, master, kept)
        weight, remainder = split(kept, source.dtype)
        source.copy_(weight)  # which differs only where ties were rounded to even
        value = memory_like(param, dtype)
        local(value).copy_(remainder)
    elif was_split and not is_split:
        remainder = local(value)
        value = fitted(param, param)
        local(value).copy_(joined(source, remainder))
    entry["master"] = value


def check_shape(name: str, value: Any, param: Tensor) -> None:
    """Raise unless ``value`` can become the state ``name`` of ``param``."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"has state {name!r} of type {type(value).__name__}; expected a tensor. Pass a state_dict()."
        )
    if value.shape != param.shape or value.is_complex() != param.is_complex():
        raise ValueError(
            f"has state {name!r} of shape {list(value.shape)}, {value.dtype}; expected {list(param.shape)} "
            f"for a {param.dtype} parameter. Load a matching checkpoint, or clear optimizer.state."
        )
