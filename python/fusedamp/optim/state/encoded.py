"""Tensor subclasses for encoded states: 8-bit states with block scales, and split masters' remainders.

Generic edits of an optimizer's state (appending rows, masking, casting, averaging over workers) must not
treat quantized values as numbers. These subclasses prevent that: arithmetic with an 8-bit state dequantizes
it, whole copies stay encoded, and any other operation raises a TypeError that names it. Steps use the plain
tensors inside.
"""

from __future__ import annotations

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

from ...ops import recode

_aten = torch.ops.aten
_COPIES = (_aten.detach.default, _aten.alias.default, _aten.clone.default, _aten.lift_fresh.default)


class Encoded(Tensor):
    """A tensor subclass around ``bits`` (a plain tensor of the parameter's shape), without storage of its
    own."""

    bits: Tensor
    _what = "an encoded state"
    _way_out = ""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Any:
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        if type(value) is not type(self) or value.shape != self.shape:
            self._refuse("an assignment to .data")
        vars(self).update(vars(value))

    def _map(self, function: Any) -> Encoded:
        """Return a copy with ``function`` applied to each plain tensor inside."""
        made = type(self)(*map(function, vars(self).values()))
        if made.bits.stride() != self.bits.stride():  # scale blocks follow the memory order
            self._refuse("a change of the memory order")
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoded:
        made: Encoded = memo.setdefault(id(self), self._map(lambda tensor: copy.deepcopy(tensor, memo)))
        return made

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), tuple(vars(self).values())

    def share_memory_(self) -> Encoded:
        self._map(Tensor.share_memory_)
        return self

    def is_shared(self) -> bool:
        return bool(self.bits.is_shared())  # type: ignore[no-untyped-call]

    def untyped_storage(self) -> torch.UntypedStorage:
        return self._refuse("untyped_storage()")

    def data_ptr(self) -> int:
        return self._refuse("data_ptr()")

    def __dlpack__(self, **kwargs: Any) -> Any:
        return self._refuse("__dlpack__()")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        bits = self.bits
        return f"{type(self).__name__}(shape={list(bits.shape)}, bits={bits.dtype}, device={bits.device})"

    def _values(self) -> Tensor:
        return self._refuse("a conversion to numbers")

    @classmethod
    def _refuse(cls, what: object) -> NoReturn:
        raise TypeError(
            f"[fusedamp.optim] {what} is not supported on {cls._what}, which is encoded; expected whole "
            f"copies. {cls._way_out}."
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        source: Any = args[0] if args else None
        if func in _COPIES and type(source) is cls:
            return source._map(lambda tensor: func(tensor, *args[1:], **kwargs))
        if func is _aten._to_copy.default and kwargs.get("dtype") in (None, source.dtype):
            kwargs = {name: value for name, value in kwargs.items() if name != "dtype"}
            return source._map(lambda tensor: func(tensor, **kwargs))
        if func in (_aten.is_pinned.default, _aten._pin_memory.default, _aten.pin_memory.default):
            pinned = source._map if "pin_memory" in func.__name__ else lambda function: function(source.bits)
            return pinned(lambda tensor: func(tensor, *args[1:], **kwargs))
        if func is _aten.zero_.default:
            return source._zero_()
        if (
            func is _aten.copy_.default
            and type(source) is type(args[1]) is cls
            and source.shape == args[1].shape
            and source.bits.dtype == args[1].bits.dtype
            and source.bits.stride() == args[1].bits.stride()
        ):
            for mine, other in zip(vars(source).values(), vars(args[1]).values(), strict=True):
                mine.copy_(other, *args[2:])
            return source
        if func.namespace != "aten" or func.is_view or _writes_encoded(func, args, kwargs):
            cls._refuse(func)
        if func is _aten.equal.default and type(source) is type(args[1]) is cls:
            pairs = zip(vars(source).values(), vars(args[1]).values(), strict=True)
            return all(torch.equal(mine, other) for mine, other in pairs)
        return func(
            *tree_map_only(Encoded, lambda t: t._values(), args),
            **tree_map_only(Encoded, lambda t: t._values(), kwargs),
        )

    def _zero_(self) -> Encoded:
        self.bits.zero_()
        return self


class Quantized(Encoded):
    """An 8-bit state: quantized values and FP32 block scales.

    ``bits`` (int8, or uint8 for nonnegative states) has the parameter's shape and strides; ``scales`` has one
    element per 128 elements in memory order. Arithmetic, indexing and conversions dequantize to FP32 tensors.
    Views, collectives, and in-place writes other than ``zero_`` and ``copy_`` from the same format raise a
    TypeError.
    """

    scales: Tensor
    _what = "an 8-bit state"
    _way_out = (
        "Compute with state.float(), and assign the result: the next step quantizes it. Or load "
        'state_dict() into an optimizer with state_dtype="float32"'
    )

    @staticmethod
    def __new__(cls, bits: Tensor, scales: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(
            cls, bits.shape, strides=bits.stride(), dtype=torch.float32, device=bits.device
        )

    def __init__(self, bits: Tensor, scales: Tensor) -> None:
        self.bits, self.scales = bits, scales

    def dequantize(self) -> Tensor:
        """Return the values as a new FP32 tensor with the parameter's shape and strides."""
        return recode.dequantized(self.bits, self.scales)

    _values = dequantize

    def float(self, memory_format: Any = torch.preserve_format) -> Tensor:
        return self.dequantize()

    def _zero_(self) -> Quantized:
        self.bits.fill_(recode.zero_code(self.bits.dtype))
        self.scales.zero_()
        return self


class Scales(Encoded):
    """The block scales of an 8-bit state as a separate entry, for checkpoints; steps use those in the state
    itself."""

    _what = "the block scales of an 8-bit state"
    _way_out = Quantized._way_out

    @staticmethod
    def __new__(cls, bits: Tensor) -> Scales:
        return Tensor._make_wrapper_subclass(cls, bits.shape, dtype=bits.dtype, device=bits.device)

    def __init__(self, bits: Tensor) -> None:
        self.bits = bits


class Remainder(Encoded):
    """The remainder of a split master beyond its 16-bit weight: int16 ``bits`` of the weight's shape and
    strides."""

    _what = "the remainder of a split master"
    _way_out = (
        'Remove state["master"]: it is recreated from the weight. Or load state_dict() into an optimizer '
        'with master_weights="fp32"'
    )

    @staticmethod
    def __new__(cls, bits: Tensor) -> Remainder:
        return Tensor._make_wrapper_subclass(
            cls, bits.shape, strides=bits.stride(), dtype=bits.dtype, device=bits.device
        )

    def __init__(self, bits: Tensor) -> None:
        self.bits = bits


def parts(tensor: Encoded) -> list[Tensor]:
    """Return the plain tensors inside."""
    return list(vars(tensor).values())


def _writes_encoded(func: Any, args: Any, kwargs: Any) -> bool:
    """True if an argument that ``func`` writes is or contains an encoded tensor."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = args[i] if i < len(args) else kwargs.get(argument.name)
            if any(isinstance(tensor, Encoded) for tensor in tree_leaves(written)):
                return True
    return False


def plain(value: Tensor) -> Tensor:
    """Return the tensor that a step reads: the bits of an encoded tensor, else ``value`` itself."""
    return value.bits if isinstance(value, Encoded) else value
