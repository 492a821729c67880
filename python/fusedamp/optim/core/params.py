"""Which parameters can be stepped: their dtypes and devices, and memory of their own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...tensors.layout import STATE_DTYPES, is_fake, overlaps_itself


def _described(source: Tensor) -> str:
    return f"is {str(source.dtype).removeprefix('torch.')} of shape {list(source.shape)} on {source.device}"


def check_dtype(param: Tensor) -> None:
    """Raise where no parameter like ``param`` can be optimized."""
    if param.dtype not in STATE_DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in STATE_DTYPES)
        raise ValueError(
            f"{_described(param)}; expected one of {wanted}. Cast it, or leave it out of the optimizer."
        )


def check_place(source: Tensor) -> None:
    """Raise where a step cannot write ``source`` where it lies."""
    got = _described(source)
    if source.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{got}; expected cpu or cuda. Move the model there before the step.")
    if source.numel() and not is_fake(source) and not source.data_ptr():
        raise ValueError(f"{got} and has no storage; expected memory to update. Restore it before the step.")
    if source.numel() and overlaps_itself(source):
        raise ValueError(
            f"{got} with strides {list(source.stride())}, so that elements share an address; expected one "
            "address for each. Use param.contiguous() as the parameter."
        )


def check_distinct(where: str, params: list[Any]) -> None:
    """Raise where a parameter is among ``params`` twice."""
    if len(set(map(id, params))) != len(params):
        raise ValueError(f"{where} a parameter is given twice; expected it once. Remove the second.")


def check_aliasing(where: str, sources: Iterable[Tensor]) -> None:
    """Raise where two parameters share memory: an op that updates both at once would race with itself."""
    ranges = sorted(  # the place in the list breaks ties
        ((str(source.device), source.data_ptr(), _reach(source), i), source)
        for i, source in enumerate(sources)
        if source.numel() and not is_fake(source)
    )
    last: list[tuple[Any, Tensor]] = []  # those that may reach into what comes
    for (device, start, size, i), source in ranges:
        last = [(key, one) for key, one in last if key[0] == device and key[1] + key[2] > start]
        if any(_overlap(one, source) for _, one in last):
            raise ValueError(
                f"{where} two parameters share memory at {start:#x} on {device}; expected disjoint. "
                "Tie weights by using one Parameter object, and pass it once."
            )
        last.append(((device, start, size, i), source))


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether an element of each lies in the same memory, of two whose ranges meet."""
    size = one.element_size()
    distance = other.data_ptr() - one.data_ptr()
    if size != other.element_size() or distance % size:
        return True
    seen = torch.zeros(max(_reach(one), distance + _reach(other)) // size, dtype=torch.bool)
    seen.as_strided(one.shape, one.stride()).fill_(True)
    return bool(seen.as_strided(other.shape, other.stride(), distance // size).any())
