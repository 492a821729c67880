"""How the masters and states of one parameter are kept between steps."""

from __future__ import annotations

import inspect
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...ops.recode import SCALE_BLOCK, master_of, quantized, split_master_, zero_code
from ...tensors.layout import STATE_DTYPES, fits, fitted, memory_like, placement, strided_like
from ...tensors.shards import is_dtensor, local
from . import sharded
from .encoded import Quantized, Remainder, Scales, plain
from .foreign import WAYS_OUT
from .saved import CODES, Entry, check_scales, scale_name


class Storage(TypedDict, total=False):
    """The options of storage of masters and states; every optimizer has them."""

    master_weights: str | bool
    state_dtype: torch.dtype | str
    stochastic_rounding: bool
    rounding_seed: int | None


DEFAULTS = Storage(
    master_weights="auto", state_dtype="float32", stochastic_rounding=False, rounding_seed=None
)

# Other spellings of an option's values: Apex's and TransformerEngine's flags, and names of dtypes.
_SPELLINGS: dict[str, dict[str | bool, str]] = {
    "master_weights": {True: "fp32", False: "none", "float32": "fp32"},
    "state_dtype": {"fp32": "float32", "float": "float32", "bf16": "bfloat16"},
}


def options(given: dict[str, Any]) -> dict[str, Any]:
    """``given``, the ``locals()`` of a constructor, without its parameters and its options of storage."""
    return {name: given[name] for name in given if name not in ("self", "params", "storage", "__class__")}


def with_storage(optimizer: str, defaults: Entry, storage: Storage) -> Entry:
    """``defaults`` with the options of storage, those given and the others."""
    unknown = sorted(storage.keys() - DEFAULTS.keys())
    if unknown:
        way_out = f". {WAYS_OUT[unknown[0]]}" if unknown[0] in WAYS_OUT else ""
        raise TypeError(f"{optimizer}() got an unexpected keyword argument {unknown[0]!r}{way_out}")
    group = {**defaults, **{k: defaults.get(k, v) for k, v in DEFAULTS.items()}, **storage}
    name_dtypes(group)
    return group


def name_dtypes(group: Entry) -> None:
    """Replace each dtype in ``group`` by its name: groups hold plain values, which checkpoints of every kind
    take. Replace other spellings of storage options by ours."""
    for name, value in group.items():
        if isinstance(value, torch.dtype):
            group[name] = str(value).removeprefix("torch.")
    for name, spellings in _SPELLINGS.items():
        value = group.get(name)
        if isinstance(value, (str, bool)):
            value = value.removeprefix("torch.") if isinstance(value, str) else value
            group[name] = spellings.get(value, value)


def spelled_out(cls: type) -> inspect.Signature:
    """The signature of ``cls`` with each option of storage in the place of our own ``**storage``.

    A user's ``**options`` stay: the constructor takes whatever it hands on.
    """
    _, *parameters = inspect.signature(cls.__init__).parameters.values()  # type: ignore[misc]
    if parameters and "Unpack[Storage]" in str(parameters[-1].annotation):
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters[-1:] = [inspect.Parameter(name, kind, default=value) for name, value in DEFAULTS.items()]
    return inspect.Signature(parameters)


def stored_dtype(param_dtype: torch.dtype, state_dtype: str, nonnegative: bool) -> torch.dtype:
    """The dtype of a state of a parameter, under an option ``state_dtype`` that fits the parameter."""
    if state_dtype == "int8":
        return CODES[nonnegative]
    return STATE_DTYPES[param_dtype] if state_dtype == "float32" else torch.bfloat16


def has_master(param: Tensor, master_weights: str) -> bool:
    """Whether ``param`` keeps a master: 16-bit parameters do, unless told not to."""
    return master_weights != "none" and STATE_DTYPES.get(param.dtype, param.dtype) != param.dtype


def need_storable(param: Tensor, state_dtype: str) -> None:
    """Raise unless the states of ``param`` can be kept as the option ``state_dtype`` says."""
    if state_dtype == "float32":
        return
    if STATE_DTYPES[param.dtype] != torch.float32:
        raise ValueError(
            f"{_described(param)} in a group with state_dtype {state_dtype!r}; expected float16, bfloat16 or "
            'float32. Put it into a group of its own with state_dtype="float32", which means the wide type '
            "for it."
        )


def need_real(param: Tensor, group: Entry) -> None:
    """Raise unless ``param`` is real, or has no format that only real numbers have."""
    if param.is_complex() and (group["master_weights"] == "split" or group["stochastic_rounding"]):
        raise ValueError(
            f"{_described(param)}; expected a real parameter for split masters and stochastic rounding. Put "
            'it into a group of its own with master_weights="fp32" or "none", and stochastic_rounding=False.'
        )


def _described(param: Tensor) -> str:
    return f"is {str(param.dtype).removeprefix('torch.')} of shape {list(param.shape)}"


def filled(like: Tensor, dtype: torch.dtype, value: float) -> Tensor:
    """A new state like ``like``, kept in ``dtype``, with ``value`` everywhere."""
    if dtype not in CODES:
        return memory_like(like, dtype).fill_(complex(value, value) if dtype.is_complex else value)
    codes = memory_like(local(like), dtype)
    scales = torch.zeros(-(-codes.numel() // SCALE_BLOCK), dtype=torch.float32, device=codes.device)
    code, scale = zero_code(dtype), 0.0
    if value != 0.0:
        one = quantized(torch.full((1,), value, device="cpu"), dtype)
        code, scale = int(one[0]), float(one[1])
    return sharded.like(Quantized(codes.fill_(code), scales.fill_(scale)), like)


def adapted(entry: Entry, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state ``name`` of ``entry`` in the layout of ``like`` and in ``dtype``: itself where it fits
    already."""
    value = entry[name]
    check_shape(name, value, like)
    if isinstance(inner := local(value), Quantized):
        check_scales(name, inner.bits, inner.scales)
        if inner.bits.dtype == dtype and (kept := _moved(value, inner, like)) is not None:
            return kept
        value = sharded.dequantized(value)
    elif not isinstance(entry.get(scale_name(name)), Scales | None):
        raise ValueError(
            f"has state {name!r} of dtype {value.dtype} beside {scale_name(name)!r}, the block scales of an "
            "8-bit state; expected its int8 or uint8 values, or floats alone. Quantized values are not "
            'numbers: load the checkpoint into an optimizer with state_dtype="float32" first, or remove '
            f"{scale_name(name)!r}."
        )
    elif not (value.is_floating_point() or value.is_complex()):
        raise ValueError(
            f"has state {name!r} of dtype {value.dtype}; expected floating-point values, or a state as this "
            "optimizer made it. Assign floats, or remove the state."
        )
    if dtype not in CODES:
        return value if fits(value, like, dtype) else fitted(value, like, dtype)
    if local(value).stride() != _dense_stride(local(like)) or placement(value) != placement(like):
        value = fitted(value, like)
    return sharded.like(Quantized(*quantized(local(value).detach(), dtype, local(like).device)), like)


def _moved(value: Tensor, shard: Quantized, like: Tensor) -> Tensor | None:
    """Return an 8-bit state in the layout of ``like``; None if only its values can be brought there."""
    if is_dtensor(like) and shard is value:
        return sharded.cut(shard, like)
    here = local(like)
    if shard.bits.stride() != _dense_stride(here) or placement(value) != placement(like):
        return None
    if fits(shard.bits, here, shard.bits.dtype) and shard.scales.device == here.device:
        return value
    moved = fitted(shard.bits, here, shard.bits.dtype), shard.scales.to(here.device, torch.float32, copy=True)
    return sharded.like(Quantized(*moved), like)


def _dense_stride(like: Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta").stride()


def keep_master(entry: Entry, param: Tensor, dtype: torch.dtype) -> None:
    """Make the master of ``param``, or bring it into ``dtype`` (int16: a split one's remainder).

    A master whose rounding is not its weight follows the weight, which was modified (csrc/math/follow.h).
    """
    is_split = dtype == torch.int16
    value = entry.get("master")
    if value is None:
        entry["master"] = _wrapped(memory_like(param, dtype).zero_()) if is_split else fitted(param, param)
        return
    check_master(value, param)
    if fits(plain(value), param, dtype):
        entry["master"] = _wrapped(value)
        return
    value = plain(value)
    was_split = value.dtype == torch.int16
    value = fitted(value, param, torch.int16 if was_split else None)
    source, kept = local(param), local(value)
    weight = strided_like(source, kept)
    if is_split and not was_split:
        value = memory_like(param, dtype)
        split_master_(weight, kept, local(value))
        source.copy_(weight)  # itself, or the parameter has gaps
    elif was_split and not is_split:
        value = memory_like(param, dtype)
        master_of(weight, kept, local(value))
    entry["master"] = _wrapped(value)


def master_values(entry: Entry, param: Tensor) -> Tensor:
    """Return the master in ``entry`` as a new FP32 tensor, as the next step would use it: a split one joined
    with ``param``, and one that follows ``param`` if that was modified. Changes nothing.
    """
    value = entry["master"]
    check_master(value, param)
    kept = plain(value)
    dtype = torch.int16 if kept.dtype == torch.int16 else STATE_DTYPES[param.dtype]
    kept = kept if fits(kept, param, dtype) else fitted(kept, param, dtype)
    made = memory_like(param, STATE_DTYPES[param.dtype])
    tensors = [strided_like(local(param), local(kept)), local(kept), local(made)]
    master_of(*(torch.view_as_real(t) if t.is_complex() else t for t in tensors))
    return made


def _wrapped(master: Tensor) -> Tensor:
    """``master``, a remainder as what refuses to be a number; those of DTensors travel as plain tensors."""
    is_remainder = type(master) is Tensor and master.dtype == torch.int16
    return Remainder(master) if is_remainder else master


def check_master(value: Any, param: Tensor) -> None:
    """Raise unless ``value`` can become the master of ``param``."""
    check_shape("master", value, param)
    if value.dtype != torch.int16 and not (value.is_floating_point() or value.is_complex()):
        raise ValueError(
            f"has a master of dtype {value.dtype}; expected floating-point values, or the remainder of a "
            "split "
            'master. Remove state["master"]: it is recreated from the weight.'
        )


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
