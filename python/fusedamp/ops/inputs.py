"""What the step of one optimizer is told besides its gradients: by a loss scaler, and by hand.

The scaler and the optimizers do not know each other; they meet here.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .observers import observer_of

Number = float | Tensor
_MIN, _MAX = 2.0**-126, torch.finfo(torch.float32).max  # their reciprocals are FP32 numbers
_handed = threading.local()
# Optimizers whose gradients are used and freed within the backward pass.
stepping_in_backward: weakref.WeakSet[Any] = weakref.WeakSet()


@dataclass(frozen=True, slots=True, eq=False)
class GradientTable:
    """The gradients of an optimizer that remembers its last step, as it has just seen them."""

    fields: Tensor
    """int64 [3, n]: addresses, numbers of elements and codes of dtypes; rewritten by the next look."""
    has_float64: bool
    device: torch.device
    positions: Sequence[int]
    """The place of each gradient's parameter among all of the optimizer's."""
    mark: Callable[[], int]
    """Remembers the gradients of a versioned look, and returns a number for it."""
    is_as_marked: Callable[[int], bool]
    """Whether a versioned look saw the same tensors, not written since; who asks has kept them alive."""


class StepLog(NamedTuple):
    """Where a step notes itself on the device, all int64: it adds 1 to ``steps``, and one that is skipped
    copies ``counts`` to ``last_counts`` and ``steps`` to ``last_step``."""

    counts: Tensor
    last_counts: Tensor
    last_step: Tensor
    steps: Tensor


class DeviceInputs(NamedTuple):
    """What the scaler hands to the ops on one device: FP32 tensors of one element, or None."""

    inv_scale: Tensor | None = None
    clip_coef: Tensor | None = None
    found_inf: Tensor | None = None
    log: StepLog | None = None

    def log_arguments(self) -> dict[str, Tensor]:
        """Those of the op that steps from tables."""
        log = self.log
        if log is None:
            return {}
        return dict(
            counts=log.counts, log_counts=log.last_counts, log_step=log.last_step, log_steps=log.steps
        )


_NOTHING = DeviceInputs()


@dataclass(slots=True, eq=False)
class AmpInputs:
    """What the scaler hands to one step of ``optimizer``."""

    per_device: dict[torch.device, DeviceInputs]
    optimizer: Any = None
    table: GradientTable | None = None  # that the scaler has just checked for this step
    consumed: bool = False  # whether its step has begun
    logged: bool = False  # whether it has noted itself in the log

    def for_device(self, device: torch.device) -> DeviceInputs:
        """The inputs on ``device``; an error where the scaler saw no gradient there."""
        if device not in self.per_device:
            raise RuntimeError(
                f"[GradScaler.step] the optimizer has gradients on {device}; expected only "
                f"{[str(seen) for seen in self.per_device]}, where the scaler looked for overflows. "
                "Don't add gradients between unscale_ and step."
            )
        return self.per_device[device]


def step_with(inputs: AmpInputs, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call the ``step`` of the optimizer that ``inputs`` are for; returns what it returns.

    Raises: RuntimeError if that call did not run fusedamp's step on the optimizer.
    """
    before, optimizer = getattr(_handed, "inputs", None), inputs.optimizer
    optimizer._amp = _handed.inputs = inputs
    try:
        result = optimizer.step(*args, **kwargs)
    finally:
        optimizer._amp, _handed.inputs = None, before
    if not inputs.consumed:
        raise RuntimeError(
            f"[GradScaler.step] {type(optimizer).__name__}.step() did not run fusedamp's step on this "
            "object; expected it to, as it was handed the scale. Its gradients are still scaled, and this "
            "step is lost. Give scaler.step the optimizer itself, or override step in a subclass, "
            "which then gets unscaled gradients."
        )
    return result


def refuse_freed(op: str, params: Iterable[Any]) -> None:
    """Raise if the gradients of one of ``params`` are used within the backward pass."""
    groups = [group for optimizer in list(stepping_in_backward) for group in optimizer.param_groups]
    freed = {id(param) for group in groups for param in group["params"]}
    if any(id(param) in freed for param in params):
        raise RuntimeError(
            f"[{op}] the optimizer steps in the backward pass (step_in_backward), so its gradients are gone, "
            "and the weights were updated with them as they were; expected gradients. Load the weights "
            "again, and remove() step_in_backward's handle to scale a loss or to clip."
        )


def begin_step(optimizer: Any) -> None:
    """Take note that ``optimizer`` uses its inputs now.

    Raises: RuntimeError if inputs wait for another optimizer with one of its parameters, whose gradients are
        therefore still scaled.
    """
    inputs = getattr(_handed, "inputs", None)
    if (observer := observer_of(optimizer)) is not None and not _is_scaled(optimizer, inputs):
        observer.before_step()
    if inputs is None or inputs.consumed:
        return
    if inputs.optimizer is optimizer:
        inputs.consumed = True
        return
    waiting = {id(param) for group in inputs.optimizer.param_groups for param in group["params"]}
    if any(id(param) in waiting for group in optimizer.param_groups for param in group["params"]):
        raise RuntimeError(
            f"[{type(optimizer).__name__}.step] scaler.step was given another object "
            f"({type(inputs.optimizer).__name__}) with the same parameters, and their gradients are still "
            "scaled; expected the optimizer that steps them. Give scaler.step this optimizer, or call "
            "scaler.unscale_ and step it yourself."
        )


def _is_scaled(optimizer: Any, inputs: AmpInputs | None) -> bool:
    """Whether the scaler left the gradients of ``optimizer`` scaled in this step."""
    if inputs is None or inputs.consumed or inputs.optimizer is not optimizer:
        return False
    return any(here.inv_scale is not None for here in inputs.per_device.values())


@torch._disable_dynamo  # type: ignore[attr-defined]
def end_step(optimizer: Any) -> None:
    """Take note that the step of ``optimizer`` is over."""
    if (observer := observer_of(optimizer)) is not None:
        observer.after_step()


def by_hand(optimizer: Any) -> tuple[Number | None, Number | None]:
    """The attributes ``found_inf`` and ``grad_scale`` that a program has set on ``optimizer``.

    Raises: TypeError or ValueError naming the one that is unusable. Values on a device are not read.
    """
    found_inf, grad_scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    for name, value in (("found_inf", found_inf), ("grad_scale", grad_scale)):
        if value is None:
            continue
        if isinstance(value, Tensor):
            if value.numel() != 1 or value.is_complex() or value.layout is not torch.strided:
                what = f"a {value.dtype} tensor of shape {list(value.shape)}"
                _refuse(optimizer, name, what, TypeError)
        elif not isinstance(value, (int, float)):
            _refuse(optimizer, name, repr(value), TypeError)
        elif name == "grad_scale" and not _MIN <= abs(value) <= _MAX:
            _refuse(optimizer, name, repr(value), ValueError)
    return found_inf, grad_scale


def _refuse(optimizer: Any, name: str, got: str, error: type[Exception]) -> NoReturn:
    wanted = "0 to step, else to skip" if name == "found_inf" else "what gradients are divided by, not 0"
    raise error(
        f"[{type(optimizer).__name__}.step] {name} is {got}; expected a finite real number or a tensor of 1 "
        f"element: {wanted}. Set such a value, or delete the attribute."
    )


def flag_on(device: torch.device, found_inf: Number) -> Tensor:
    """A ``found_inf`` set by hand as an FP32 flag on ``device``: 0 or 1, NaN counts as 1; no sync."""
    if not isinstance(found_inf, Tensor):
        return torch.full((), float(found_inf != 0), dtype=torch.float32, device=device)
    here = found_inf.detach().to(device, non_blocking=device.type != "cpu")
    return (here.reshape(()) != 0).float()


def _here(value: Number, device: torch.device) -> Number:
    if not isinstance(value, Tensor):
        return value
    return value.detach().to(device, non_blocking=device.type != "cpu").reshape(()).double()


def _or_one(factor: Tensor | None, device: torch.device) -> Tensor:
    return torch.ones((), device=device).double() if factor is None else factor.reshape(()).double()


def divided(factor: Tensor | None, grad_scale: Number, device: torch.device) -> Tensor:
    """``factor / grad_scale`` (None stands for 1) as a 0-d FP32 tensor on ``device``; no sync."""
    return (_or_one(factor, device) / _here(grad_scale, device)).float()


def times(scale: Tensor | None, grad_scale: Number, device: torch.device) -> Tensor:
    """``scale * grad_scale``, likewise."""
    return (_or_one(scale, device) * _here(grad_scale, device)).float()


def inputs_on(optimizer: Any, device: torch.device) -> DeviceInputs:
    """All that the step of ``optimizer`` is told on ``device``, by its scaler and by hand; no sync."""
    amp = _NOTHING if optimizer._amp is None else optimizer._amp.for_device(device)
    found_inf, grad_scale = by_hand(optimizer)
    if found_inf is None and grad_scale is None:
        return amp
    flag, inv_scale = amp.found_inf, amp.inv_scale
    if found_inf is not None:
        hand = flag_on(device, found_inf)
        flag = hand if flag is None else torch.maximum(flag.reshape(()), hand)
    if grad_scale is not None:
        inv_scale = divided(inv_scale, grad_scale, device)
    return DeviceInputs(inv_scale, amp.clip_coef, flag)
