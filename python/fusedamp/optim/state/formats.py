"""How the masters and states of one parameter are kept between steps."""

from __future__ import annotations

import inspect
from functools import reduce
from typing import Any, TypedDict

import torch
from torch import Tensor

from ...ops.recode import SCALE_BLOCK, master_of, quantized, split_master_, zero_code
from ...tensors.layout import STATE_DTYPES, fits, fitted, is_fake, memory_like, strided_like
from ...tensors.shards import local
from ...tensors.travel import as_bytes, from_bytes, holds_bytes
from .encoded import Encoded, Quantized, Remainder, Scales, plain
from .foreign import WAYS_OUT

Entry = dict[str, Any]  # optimizer.state[param]
CODES = (torch.int8, torch.uint8)  # of signed states, and of those that are never negative


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


def scale_name(state: str) -> str:
    """The key in a checkpoint of the block scales of an 8-bit state."""
    return f"{state}_scale"


def numel_name(state: str) -> str:
    """Return the key in a checkpoint of the number of elements of an encoded state."""
    return f"{state}_numel"


def order_name(state: str) -> str:
    """The key in a checkpoint of the order in which an 8-bit state's dimensions lie in memory."""
    return f"{state}_order"


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
    kind = _described(param)
    if STATE_DTYPES[param.dtype] != torch.float32:
        raise ValueError(
            f"{kind} in a group with state_dtype {state_dtype!r}; expected float16, bfloat16 or float32. Put "
            'it into a group of its own with state_dtype="float32", which means the wide type for it.'
        )
    if state_dtype == "int8" and local(param) is not param:
        raise ValueError(
            f"{kind}, a DTensor, in a group with state_dtype 'int8'; expected a plain tensor, as block "
            'scales belong to a shard\'s memory and could not be resharded. Use state_dtype="bfloat16".'
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
    codes = memory_like(like, dtype)
    scales = torch.zeros(-(-like.numel() // SCALE_BLOCK), dtype=torch.float32, device=like.device)
    code, scale = zero_code(dtype), 0.0
    if value != 0.0:
        one = quantized(torch.full((1,), value, device="cpu"), dtype)
        code, scale = int(one[0]), float(one[1])
    return Quantized(codes.fill_(code), scales.fill_(scale))


def adapted(entry: Entry, name: str, like: Tensor, dtype: torch.dtype) -> Tensor:
    """The state ``name`` of ``entry`` in the layout of ``like`` and in ``dtype``: itself where it fits
    already."""
    value = entry[name]
    check_shape(name, value, like)
    if isinstance(value, Quantized):
        check_scales(name, value.bits, value.scales)
        if value.bits.dtype == dtype and value.bits.stride() == _dense_stride(like):
            if fits(value.bits, like, dtype) and value.scales.device == like.device:
                return value
            return Quantized(
                fitted(value.bits, like, dtype), value.scales.to(like.device, torch.float32, copy=True)
            )
        value = value.dequantize()
    elif not isinstance(entry.get(scale_name(name)), Scales | None):
        raise ValueError(
            f"has state {name!r} of dtype {value.dtype} beside {scale_name(name)!r}, the block scales of an "
            "8-bit state; expected its int8 or uint8 values, or floats alone. Quantized values are no "
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
    if local(value).stride() != _dense_stride(like):
        value = fitted(value, like)
    return Quantized(*quantized(value.detach(), dtype, like.device))


def _dense_stride(like: Tensor) -> tuple[int, ...]:
    return torch.empty_like(like, device="meta").stride()


def check_scales(name: str, values: Tensor, scales: Any) -> None:
    """Raise unless ``scales`` can be the block scales of the 8-bit ``values``."""
    wanted = -(-values.numel() // SCALE_BLOCK)
    if not isinstance(scales, Tensor) or scales.shape != (wanted,) or scales.dtype != torch.float32:
        got = f"{scales.dtype} of shape {list(scales.shape)}" if isinstance(scales, Tensor) else repr(scales)
        raise ValueError(
            f"has 8-bit state {name!r} of {values.numel()} elements with block scales {got}; expected "
            f"torch.float32 of shape [{wanted}]. Pass what state_dict() returned, or clear optimizer.state."
        )


def taken_from_checkpoint(entry: Entry, name: str, nonnegative: bool) -> None:
    """Make one tensor of the values, scales and size of an 8-bit state in a saved ``entry``, in place."""
    value = entry.get(name)
    if not isinstance(value, Tensor) or value.dtype not in CODES or isinstance(value, Encoded):
        return
    scales, numel = entry.pop(scale_name(name), None), entry.pop(numel_name(name), value.numel())
    order = entry.pop(order_name(name), None)
    scales = plain(scales) if isinstance(scales, Tensor) else scales
    check_scales(name, value, scales)
    if value.dtype != CODES[nonnegative]:
        raise ValueError(
            f"has 8-bit state {name!r} of dtype {value.dtype}; expected {CODES[nonnegative]}, as it "
            f"{'never is' if nonnegative else 'may be'} negative. Pass what state_dict() returned."
        )
    if numel != value.numel():
        raise ValueError(
            f"has 8-bit state {name!r} of {value.numel()} elements, which was saved with {numel}; expected "
            "all of them, as their block scales belong to their places. To add or remove elements, load the "
            'checkpoint into an optimizer with state_dtype="float32", whose states are numbers.'
        )
    powers = scales.view(torch.int32) & 0x7FFFFF if not is_fake(scales) else None
    if powers is not None and not ((powers == 0) & (scales >= 0) | scales.isnan()).all():
        raise ValueError(
            f"has 8-bit state {name!r} with {scale_name(name)!r} that are no powers of two; expected the "
            "scales that were saved with it. Scales can't be averaged or cast: do so with the states of an "
            'optimizer with state_dtype="float32".'
        )
    entry[name] = Quantized(value if order is None else _in_order(value, order), scales)
    label(entry, name)


def for_checkpoint(entry: Entry) -> Entry:
    """``entry`` as plain tensors, which every program can read; of 8-bit states, contiguous ones in the order
    of memory, to which their block scales belong, so that no copy of them changes it; of remainders, bytes,
    which collectives can move.
    """
    for name, value in list(entry.items()):
        if isinstance(value, Tensor) and not isinstance(value, Scales):
            label(entry, name)  # it may have been replaced since the last step
        elif isinstance(value, Scales):
            state = name.removesuffix(scale_name(""))
            if not isinstance(entry.get(state), Quantized):  # it was removed since
                for known in (name, numel_name(state), order_name(state)):
                    entry.pop(known, None)
    saved = {name: plain(value) if isinstance(value, Tensor) else value for name, value in entry.items()}
    master = saved.get("master")
    if isinstance(master, Tensor) and master.dtype == torch.int16:
        saved["master"] = as_bytes(master)
    for name, value in entry.items():
        if isinstance(value, Quantized) and not value.bits.is_contiguous():
            saved[name] = value.bits.permute(_order(value.bits)).reshape(value.shape)
    return saved


def bits_from_checkpoint(entry: Entry, param: Tensor) -> None:
    """Replace the saved bytes of a split master's remainder in ``entry`` by its bits, and drop its size."""
    value, numel = entry.get("master"), entry.pop(numel_name("master"), None)
    if not isinstance(value, Tensor):
        return
    if holds_bytes(value, param.shape):
        entry["master"] = value = from_bytes(value)
    if numel is not None and not (plain(value).dtype == torch.int16 and value.numel() == numel):
        raise ValueError(
            f"has a master of dtype {value.dtype} and shape {list(value.shape)}, saved as the remainder of a "
            f"split one of {numel} elements; expected its unchanged bytes, torch.uint8 of shape "
            f"{[*param.shape, 2]}. Load the intact checkpoint, or remove 'master' from it: it is created "
            "from the weight."
        )


def _order(dense: Tensor) -> list[int]:
    """The dimensions of a dense tensor as its memory has them, the outermost first."""
    strides = dense.stride()
    return sorted(range(dense.dim()), key=lambda d: (-strides[d], d))


def _order_number(dense: Tensor) -> int:
    """:func:`_order` as one number, which every kind of checkpoint can hold."""
    return reduce(lambda number, dim: 64 * number + dim, _order(dense), 1)


def _in_order(saved: Tensor, number: int) -> Tensor:
    """The view of ``saved``, contiguous in the order of memory, that has the order ``number`` again."""
    order: list[int] = []
    while number > 1:
        number, dim = divmod(number, 64)
        order.insert(0, dim)
    if sorted(order) != list(range(saved.dim())):
        raise ValueError(
            f"has an 8-bit state of shape {list(saved.shape)} with the order {order} of dimensions; expected "
            "each once. Load an intact checkpoint."
        )
    permuted = saved.contiguous().view([saved.size(d) for d in order])
    return permuted.permute([order.index(d) for d in range(saved.dim())])


def label(entry: Entry, name: str) -> None:
    """Put beside the state ``name`` what a checkpoint needs to know of it, and nothing else."""
    value, scales = entry[name], scale_name(name)
    if isinstance(value, Encoded) or value.dtype == torch.int16:
        entry[numel_name(name)] = value.numel()
    else:
        entry.pop(numel_name(name), None)
    if not isinstance(value, Quantized):
        entry.pop(scales, None)
        entry.pop(order_name(name), None)
        return
    if getattr(entry.get(scales), "bits", None) is not value.scales:
        entry[scales] = Scales(value.scales)
    entry[order_name(name)] = _order_number(value.bits)


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
