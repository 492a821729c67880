"""Checks of failing calls: a documented error type, one line that starts with the op, and no changes."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import pytest
import torch
from op_calls import StepCall, Unchanged
from torch import Tensor

NO_DATA = "on the meta device and has no data; expected a tensor with memory. Move it with .to_empty()"


class Refusal(NamedTuple):
    """A wrong argument, and what the error must say about it."""

    change: Any
    error: type[Exception]
    texts: tuple[str, ...]


def bad_value(change: Any, *texts: str) -> Refusal:
    return Refusal(change, ValueError, texts)


def bad_type(change: Any, *texts: str) -> Refusal:
    return Refusal(change, TypeError, texts)


def check(run: Callable[[], Any], tensors: Iterable[Tensor], op: str, refusal: Refusal) -> None:
    with Unchanged(list(tensors)), pytest.raises(refusal.error) as caught:
        run()
    text = str(caught.value)
    assert text.startswith(f"[{op}] "), text
    assert "\n" not in text
    for wanted in refusal.texts:
        assert wanted in text


def put(name: str, index: int, new: Callable[[Tensor], Any]) -> Callable[[StepCall], None]:
    """Changes a call: tensor `index` of list `name` becomes new(tensor)."""

    def change(call: StepCall) -> None:
        tensors = call.lists()[name]
        tensors[index] = new(tensors[index])

    return change


def pop(name: str) -> Callable[[StepCall], None]:
    return lambda call: call.lists()[name].pop()


def option(**options: Any) -> Callable[[StepCall], None]:
    return lambda call: call.options.update(options)


def meta(t: Tensor) -> Tensor:
    return t.to("meta")


def freed(t: Tensor) -> Tensor:
    t = torch.zeros_like(t)  # a clone() of one that is freed already would crash
    t.untyped_storage().resize_(0)
    return t


def with_gaps(t: Tensor) -> Tensor:
    return torch.stack([t, t], -1)[..., 0]
