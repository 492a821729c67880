"""What is wrong with an argument, said so that a user can act on it: of ops, optimizers and scalers.

``where`` starts a message, as ``[AdamW] group 0:``. torch rejects a None in a list, a float where a tensor
belongs or a sparse tensor in words about schemas and dispatch keys. Lists and numbers are checked before the
call of an op; what is in the lists is read only after torch has refused it.
"""

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor

from ..tensors.layout import is_fake

INT32_MAX = 2**31 - 1


@contextmanager
def at(where: str) -> Iterator[None]:
    """Within it errors about values and types start with ``where``."""
    try:
        yield
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where} {error}") from error


def need_lists(op: str, **lists: Any) -> None:
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"[{op}] {name} is {_kind(value)}; expected a list of tensors")


def refuse(where: str, name: str, got: object, wanted: str) -> NoReturn:
    raise ValueError(f"{where} {name} is {_shown(got)}; expected {wanted}. Pass such a value.")


def need_number(where: str, name: str, value: Any, flags: bool = False) -> None:
    """Raise where ``value`` is text, complex, a bool without ``flags``, or a tensor of other than one real.

    What a tensor holds is not read.
    """
    odd = isinstance(value, (str, bytes, complex)) or (isinstance(value, bool) and not flags)
    if isinstance(value, Tensor):
        odd = value.numel() != 1 or value.dtype is torch.bool or value.is_complex()
    if odd:
        _refuse_kind(where, name, value)


def number(where: str, name: str, value: Any, flags: bool = False) -> float:
    """``value``, a real number or a tensor of one, as a float; inf where it is beyond a float.

    ``flags``: whether bools are taken, as 0 and 1. A tensor on a device makes the host wait.
    """
    kind = type(value)
    if kind is float or (kind is bool and flags):  # quick: every step asks
        return float(value)
    if kind is not int:
        need_number(where, name, value, flags)
    try:
        if not isinstance(value, Tensor) or not is_fake(value):
            return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf
    except (TypeError, ValueError, RuntimeError):
        pass
    _refuse_kind(where, name, value)


def need_length(where: str, name: str, value: Any, length: int) -> None:
    """Raise unless ``value`` is a tuple or list of ``length``."""
    if not isinstance(value, (list, tuple)):
        raise TypeError(f"{where} {name} is {_shown(value)}; expected {length} numbers. Pass a tuple.")
    if len(value) != length:
        refuse(where, name, value, f"{length} numbers")


def numbers(where: str, name: str, value: Any, length: int = 2) -> list[float]:
    """``value``, a tuple or list of ``length`` numbers."""
    need_length(where, name, value, length)
    return [number(where, f"{name}[{i}]", item) for i, item in enumerate(value)]


def count(where: str, name: str, value: Any, what: str, low: int = 1, high: int = INT32_MAX) -> int:
    """``value``, a whole number from ``low`` to ``high`` in whatever type; ``what`` says what it counts."""
    exact = number(where, name, value)
    if not low <= exact <= high or not exact.is_integer():
        refuse(where, name, value, f"a whole number from {low} to {high}: {what}")
    return int(exact)


def flag(where: str, name: str, value: Any) -> bool:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"{where} {name} is {_shown(value)}; expected True or False")
    return bool(value)


def _refuse_kind(where: str, name: str, value: object) -> NoReturn:
    raise TypeError(
        f"{where} {name} is {_shown(value)}; expected a number. Pass a float, or a tensor of one real."
    )


def _shown(value: object) -> str:
    if not isinstance(value, Tensor):
        return repr(value)
    if value.numel() != 1 or is_fake(value):
        return f"a {value.dtype} tensor of shape {list(value.shape)}"
    return repr(value.item())


def need_whole_numbers(op: str, name: str, numbers: Any) -> None:
    low, high = "-2**63", "2**63 - 1"
    if not isinstance(numbers, (list, tuple)):
        raise TypeError(
            f"[{op}] {name} is {numbers!r}; expected a list of whole numbers from {low} to {high}"
        )
    for i, number in enumerate(numbers):
        text = f"[{op}] {name}[{i}] is {number!r}; expected a whole number from {low} to {high}"
        if not isinstance(number, int) or isinstance(number, bool):
            raise TypeError(text)
        if not -(2**63) <= number < 2**63:
            raise ValueError(text)


def complaint(op: str, error: RuntimeError) -> ValueError | None:
    """What the op itself has to say about its arguments, without C++ line numbers; None where the error is
    torch's or the device's."""
    where = r"(?:\w+, [^\n]*:\d+, )?"  # function, file and line
    own = re.match(rf"{where}(\[{re.escape(op)}\] .+)", str(error))
    return None if own is None else ValueError(own[1])


def explain(
    say: str, op: str, error: RuntimeError, args: tuple[Any, ...], kwargs: dict[str, Any], built: str
) -> NoReturn:
    """Raises what a refused call of ``op`` is about, in the name of ``say``; ``error`` itself where its
    arguments are of the right kinds."""
    device = torch.device("cpu")
    for name, value in _tensors(op, args, kwargs):
        if not isinstance(value, Tensor):
            raise TypeError(f"[{say}] {name} is {_kind(value)}; expected a tensor") from None
        if value.is_meta:
            raise ValueError(
                f"[{say}] {name} is on the meta device and has no data; expected a tensor with memory. Move "
                "it with .to_empty() first"
            ) from None
        if value.layout is not torch.strided:
            raise ValueError(
                f"[{say}] {name} is sparse ({value.layout}); expected a strided tensor. Pass its values, or "
                ".to_dense()"
            ) from None
        device = value.device if value.device.type != "cpu" else device
    if isinstance(error, NotImplementedError):
        raise NotImplementedError(
            f"[{say}] has no kernel for tensors on {device} in this build of fusedamp (CUDA ops: {built}). "
            "Build it with nvcc under a torch that has CUDA, or move the tensors to the CPU"
        ) from error
    raise error


def _tensors(op: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Name and value of everything that the op's schema calls a tensor."""
    value: Any
    for i, argument in enumerate(getattr(torch.ops.fusedamp, op).default._schema.arguments):
        value, kind = args[i] if i < len(args) else kwargs.get(argument.name), str(argument.type)
        if kind == "List[Tensor]":
            need_lists(op, **{argument.name: value})
            yield from ((f"{argument.name}[{j}]", item) for j, item in enumerate(value))
        elif kind == "Tensor" or (kind == "Optional[Tensor]" and value is not None):
            yield argument.name, value


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"
