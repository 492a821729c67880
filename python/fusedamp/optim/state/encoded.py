"""States whose bits mean a number only together with something else, as tensors that know it.

A generic edit of an optimizer's state (appending rows, masking, casting, averaging over workers) must not
take quantized values for numbers. So live states in 8 bits and the remainders of split masters are tensors
of classes of their own: what computes with a quantized state gets its values, whole copies stay what they
are, and everything else is refused by name. Steps use the plain tensors inside.
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
    """A tensor that holds ``bits`` (plain, of the parameter's shape); it has no memory of its own."""

    bits: Tensor
    _what = "an encoded state"
    _way_out = ""
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Any:  # type: ignore[override]
        return self.detach()

    @data.setter
    def data(self, value: Any) -> None:
        if type(value) is not type(self) or value.shape != self.shape:
            self._refuse("an assignment to .data")
        vars(self).update(vars(value))

    def _map(self, function: Any) -> Encoded:
        """The same with ``function`` applied to each plain tensor inside."""
        made = type(self)(*map(function, vars(self).values()))
        if made.bits.stride() != self.bits.stride():  # blocks of scales are neighbours in memory
            self._refuse("another order in memory")
        return made

    def __deepcopy__(self, memo: dict[int, Any]) -> Encoded:
        return memo.setdefault(id(self), self._map(lambda tensor: copy.deepcopy(tensor, memo)))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return type(self), tuple(vars(self).values())

    def share_memory_(self) -> Encoded:
        self._map(Tensor.share_memory_)
        return self

    def is_shared(self) -> bool:
        return self.bits.is_shared()

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
            f"[fusedamp.optim] {what} was asked of {cls._what}, whose bits are no numbers; expected whole "
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
    """A state in 8 bits: quantized values and the FP32 scales of their blocks.

    ``bits`` (int8, or uint8 where values are never negative) has the parameter's shape and strides;
    ``scales`` has one number for each 128 elements in the order of memory. Arithmetic, indexing and
    conversions give FP32 tensors of the values; a view, a write in place other than ``zero_`` and ``copy_``
    of the like, and a collective raise a TypeError.
    """

    scales: Tensor
    _what = "a state in 8 bits"
    _way_out = (
        "Compute with state.float(), and put the result in its place: the next step quantizes it. Or load "
        'state_dict() into an optimizer with state_dtype="float32"'
    )

    @staticmethod
    def __new__(cls, bits: Tensor, scales: Tensor) -> Quantized:
        return Tensor._make_wrapper_subclass(
            cls, bits.shape, strides=bits.stride(), dtype=torch.float32, device=bits.device
        )

    def __init__(self, bits: Tensor, scales: Tensor) -> None:
        self.bits, self.scales = bits, scales

    def dequantize(self) -> Tensor:  # type: ignore[override]
        """The values: a new FP32 tensor with the parameter's shape and strides."""
        return recode.dequantized(self.bits, self.scales)

    _values = dequantize

    def float(self, memory_format: Any = torch.preserve_format) -> Tensor:  # type: ignore[override]
        return self.dequantize()

    def _zero_(self) -> Quantized:
        self.bits.fill_(recode.zero_code(self.bits.dtype))
        self.scales.zero_()
        return self


class Scales(Encoded):
    """The block scales of a state in 8 bits, for checkpoints to find them; steps use those in the state
    itself."""

    _what = "the block scales of a state in 8 bits"
    _way_out = Quantized._way_out

    @staticmethod
    def __new__(cls, bits: Tensor) -> Scales:
        return Tensor._make_wrapper_subclass(cls, bits.shape, dtype=bits.dtype, device=bits.device)

    def __init__(self, bits: Tensor) -> None:
        self.bits = bits


class Remainder(Encoded):
    """What a split master has beyond its 16-bit weight: int16 ``bits`` of the weight's shape and strides."""

    _what = "the remainder of a split master"
    _way_out = (
        'Remove state["master"]: it is made anew from the weight. Or load state_dict() into an optimizer '
        "with "
        'master_weights="fp32"'
    )

    @staticmethod
    def __new__(cls, bits: Tensor) -> Remainder:
        return Tensor._make_wrapper_subclass(
            cls, bits.shape, strides=bits.stride(), dtype=bits.dtype, device=bits.device
        )

    def __init__(self, bits: Tensor) -> None:
        self.bits = bits


def parts(tensor: Encoded) -> list[Tensor]:
    """The plain tensors inside."""
    return list(vars(tensor).values())


def _writes_encoded(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether one of the arguments that ``func`` writes is, or has in it, an encoded tensor."""
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            written = args[i] if i < len(args) else kwargs.get(argument.name)
            if any(isinstance(tensor, Encoded) for tensor in tree_leaves(written)):
                return True
    return False


def plain(value: Tensor) -> Tensor:
    """The tensor that a step reads: the bits of an encoded one, else ``value`` itself."""
    return value.bits if isinstance(value, Encoded) else value
