"""What checkpoints hold of masters and states: plain tensors and numbers that every program can read."""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ...ops.recode import SCALE_BLOCK
from ...tensors.layout import is_fake
from ...tensors.shards import is_dtensor, local
from ...tensors.travel import as_bytes, from_bytes, holds_bytes
from . import sharded
from .encoded import Encoded, Quantized, Scales, plain

Entry = dict[str, Any]  # optimizer.state[param]
CODES = (torch.int8, torch.uint8)  # of signed states, and of those that are never negative


def scale_name(state: str) -> str:
    """The key in a checkpoint of the block scales of an 8-bit state."""
    return f"{state}_scale"


def numel_name(state: str) -> str:
    """Return the key in a checkpoint of the number of elements of an encoded state."""
    return f"{state}_numel"


def order_name(state: str) -> str:
    """The key in a checkpoint of the order in which an 8-bit state's dimensions lie in memory."""
    return f"{state}_order"


def check_scales(name: str, values: Tensor, scales: Any) -> None:
    """Raise unless ``scales`` can be the block scales of the 8-bit ``values``."""
    wanted = -(-values.numel() // SCALE_BLOCK)
    if not isinstance(scales, Tensor) or scales.shape != (wanted,) or scales.dtype != torch.float32:
        got = f"{scales.dtype} of shape {list(scales.shape)}" if isinstance(scales, Tensor) else repr(scales)
        raise ValueError(
            f"has 8-bit state {name!r} of {values.numel()} elements with block scales {got}; expected "
            f"torch.float32 of shape [{wanted}]. Pass what state_dict() returned, or clear optimizer.state."
        )


def taken_from_checkpoint(entry: Entry, name: str, nonnegative: bool, param: Tensor) -> None:
    """Make one tensor of the values, scales and size of an 8-bit state of ``param`` in a saved ``entry``, in
    place."""
    value = entry.get(name)
    if not isinstance(value, Tensor) or value.dtype not in CODES or isinstance(value, Encoded):
        return
    scales, numel = entry.pop(scale_name(name), None), entry.pop(numel_name(name), value.numel())
    order = entry.pop(order_name(name), None)
    state = value
    if isinstance(scales, Tensor):
        scales = plain(scales)
        state = sharded.together(value, scales, param)
        shard = local(state)
        assert isinstance(shard, Quantized)
        value, scales = shard.bits, shard.scales
    check_scales(name, value, scales)
    if value.dtype != CODES[nonnegative]:
        raise ValueError(
            f"has 8-bit state {name!r} of dtype {value.dtype}; expected {CODES[nonnegative]}, as it "
            f"{'never is' if nonnegative else 'may be'} negative. Pass what state_dict() returned."
        )
    if numel != state.numel():
        raise ValueError(
            f"has 8-bit state {name!r} of {state.numel()} elements, which was saved with {numel}; expected "
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
    entry[name] = state if order is None else Quantized(_in_order(value, order), scales)
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
        if is_dtensor(value) and isinstance(local(value), Quantized):
            parts = sharded.apart(value)
            saved[name] = sharded.dequantized(value) if parts is None else parts[0]
            if parts is not None:
                saved |= {scale_name(name): parts[1], numel_name(name): value.numel()}
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
