"""What is wrong with the kinds of an op's arguments, said so that a user can act on it.

torch rejects a None in a list, a float where a tensor belongs or a sparse tensor in words about schemas and
dispatch keys. Lists and numbers are checked before the call; what is in the lists is looked at only after
torch has refused it.
"""

import re
from collections.abc import Iterator
from typing import Any, NoReturn

import torch
from torch import Tensor


def need_lists(op: str, **lists: Any) -> None:
    for name, value in lists.items():
        if not isinstance(value, (list, tuple)):
            raise TypeError(f"[{op}] {name} is {_kind(value)}; expected a list of tensors")


def number(op: str, name: str, value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"[{op}] {name} is {value!r}; expected a number") from None


def flag(op: str, name: str, value: Any) -> bool:
    if not isinstance(value, (bool, int)):
        raise TypeError(f"[{op}] {name} is {value!r}; expected True or False")
    return bool(value)


def pair(op: str, name: str, value: Any) -> tuple[float, float]:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise TypeError(f"[{op}] {name} is {value!r}; expected a pair of numbers")
    return number(op, f"{name}[0]", value[0]), number(op, f"{name}[1]", value[1])


def need_seeds(op: str, seeds: Any) -> None:
    low, high = "-2**63", "2**63 - 1"
    if not isinstance(seeds, (list, tuple)):
        raise TypeError(f"[{op}] seeds is {seeds!r}; expected a list of whole numbers from {low} to {high}")
    for i, seed in enumerate(seeds):
        text = f"[{op}] seeds[{i}] is {seed!r}; expected a whole number from {low} to {high}"
        if not isinstance(seed, int) or isinstance(seed, bool):
            raise TypeError(text)
        if not -(2**63) <= seed < 2**63:
            raise ValueError(text)


def complaint(op: str, error: RuntimeError) -> ValueError | None:
    """What the op itself has to say about its arguments, without C++ line numbers; None where the error is
    torch's or the device's."""
    where = r"(?:\w+, [^\n]*:\d+, )?"  # function, file and line
    own = re.match(rf"{where}(\[{re.escape(op)}\] .+)", str(error))
    return None if own is None else ValueError(own[1])


def explain(
    say: str, op: str, error: RuntimeError, args: tuple, kwargs: dict[str, Any], built: str
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


def _tensors(op: str, args: tuple, kwargs: dict[str, Any]) -> Iterator[tuple[str, Any]]:
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
