"""Checks of parameters: dtype, device, and no shared memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ...tensors.layout import STATE_DTYPES, is_fake, overlaps_itself


def _described(source: Tensor) -> str:
    return f"is {str(source.dtype).removeprefix('torch.')} of shape {list(source.shape)} on {source.device}"


def check_dtype(param: Tensor) -> None:
    """Raise if the dtype of ``param`` is unsupported."""
    if param.dtype not in STATE_DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in STATE_DTYPES)
        raise ValueError(
            f"{_described(param)}; expected one of {wanted}. Cast it, or leave it out of the optimizer."
        )


def check_place(source: Tensor) -> None:
    """Raise if a step cannot write ``source`` in place."""
    got = _described(source)
    if source.device.type not in ("cpu", "cuda"):
        way = "Call its to_empty() and initialize it" if source.is_meta else "Move the model there"
        raise ValueError(f"{got}; expected cpu or cuda. {way} before the step.")
    if source.numel() and not is_fake(source) and not source.data_ptr():
        raise ValueError(f"{got} and has no storage; expected memory to update. Restore it before the step.")
    if source.numel() and overlaps_itself(source):
        raise ValueError(
            f"{got} with strides {list(source.stride())}, so elements share an address; expected one "
            "address for each. Use param.contiguous() as the parameter."
        )


def check_distinct(where: str, params: list[Any]) -> None:
    """Raise if a parameter occurs twice in ``params``."""
    if len(set(map(id, params))) != len(params):
        raise ValueError(f"{where} a parameter is given twice; expected it once. Remove the second.")


def check_aliasing(where: str, sources: Iterable[Tensor]) -> None:
    """Raise if two parameters share memory: an op that updates both concurrently would race."""
    ranges = sorted(  # the list index breaks ties
        ((str(source.device), source.data_ptr(), _reach(source), i), source)
        for i, source in enumerate(sources)
        if source.numel() and not is_fake(source)
    )
    last: list[tuple[Any, Tensor]] = []  # those that may overlap later ones
    for (device, start, size, i), source in ranges:
        last = [(key, one) for key, one in last if key[0] == device and key[1] + key[2] > start]
        if any(_overlap(one, source) for _, one in last):
            raise ValueError(
                f"{where} two parameters share memory at {start:#x} on {device}; expected disjoint. "
                "Tie weights by using one Parameter object, and pass it once."
            )
        last.append(((device, start, size, i), source))


def _reach(tensor: Tensor) -> int:
    """Return the bytes from the first element to the end of the last."""
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """True if two tensors with overlapping ranges have an element in the same memory."""
    size = one.element_size()
    distance = other.data_ptr() - one.data_ptr()
    if size != other.element_size() or distance % size:
        return True
    seen = torch.zeros(max(_reach(one), distance + _reach(other)) // size, dtype=torch.bool)
    seen.as_strided(one.shape, one.stride()).fill_(True)
    return bool(seen.as_strided(other.shape, other.stride(), distance // size).any())
