"""Small tensors on devices: overflow flags, the largest gradient, and where they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

PerDevice = dict[torch.device, Tensor]


def on(tensor: Tensor, device: torch.device) -> Tensor:
    """Return ``tensor`` on ``device`` without a sync; only a copy to the CPU syncs, because the host reads it
    next."""
    return tensor.to(device, non_blocking=device.type != "cpu")


def lasting() -> AbstractContextManager[None]:
    """Return a context for creating tensors that can also be modified outside of inference mode."""
    if torch.compiler.is_compiling() or not torch.is_inference_mode_enabled():
        return nullcontext()
    return _outside_inference_mode()


@contextmanager
def _outside_inference_mode() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def no_overflow(device: torch.device) -> Tensor:
    with lasting():
        return torch.zeros((), dtype=torch.float32, device=device)


def has_value(tensor: Tensor) -> bool:
    """True if ``tensor`` has a value; a meta tensor, or one under FakeTensorMode, has none."""
    return not (is_fake(tensor) or tensor.is_meta)


def combine(flags: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return a 0-d FP32 flag on ``device``: positive if any of ``flags`` (1 element, any device) is, else
    0."""
    flags = list(flags)
    if (
        len(flags) == 1
        and flags[0].device == device
        and not flags[0].dim()
        and flags[0].dtype is torch.float32
    ):
        return flags[0]
    moved = [on(flag, device).reshape(()).float() for flag in flags]
    if not moved:
        return no_overflow(device)
    return _largest(moved)


def _largest(values: list[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(values).amax()


def largest_of(found: Iterable[Tensor], device: torch.device) -> Tensor:
    """Return the largest of ``found`` on ``device``: FP64, 0-d; 0 of none."""
    moved = [value if value.device == device else on(value, device) for value in found]
    if not moved:
        with lasting():
            return torch.zeros((), dtype=torch.float64, device=device)
    return _largest(moved)


def reduced(
    flag: Tensor, largest: Tensor | None, reduce: Callable[[Tensor], None]
) -> tuple[Tensor, Tensor | None]:
    """Return the maxima over ranks of an overflow flag and of the largest gradient, if there is one, by one
    call of ``reduce``, which works in place."""
    if largest is None:
        flag = flag.clone()
        reduce(flag)
        return flag, None
    both = torch.stack((flag.double(), largest))
    reduce(both)
    return both[0].float(), both[1]
