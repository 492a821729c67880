"""Determines how GradScaler.step calls an optimizer."""

from __future__ import annotations

import inspect
import weakref
from types import FunctionType
from typing import Any

import torch
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import _global_optimizer_pre_hooks

from ..ops import inputs

# torch wraps each class's step in this function, which runs the hooks.
_HOOKED = Optimizer.profile_hook_step(lambda optimizer: None).__code__


def _inside_hooks(function: Any) -> Any:
    return function.__wrapped__ if getattr(function, "__code__", None) is _HOOKED else function


_TORCHS_FUSED = (torch.optim.SGD, torch.optim.Adam, torch.optim.Adagrad)
_TORCHS_STEPS = {_inside_hooks(kind.step) for kind in _TORCHS_FUSED}


def is_fusedamps(optimizer: Optimizer) -> bool:
    """True for an optimizer of a fusedamp class or a subclass."""
    return getattr(type(optimizer), "_fusedamp_fused", False)


def is_ours(optimizer: Optimizer) -> bool:
    """True if ``optimizer.step`` is fusedamp's own method on this object and nothing before it can read
    gradients. Such a step takes the scale, the clip coefficient and the overflow flag.

    Subclasses that override ``step``, wrappers, a replaced ``step`` (Accelerate counts its calls) and step
    pre-hooks need unscaled gradients, and must not be called for a skipped step.
    """
    return is_fusedamps(optimizer) and _runs(optimizer, {getattr(type(optimizer), "_fusedamp_step", None)})


def _runs(optimizer: Optimizer, steps: set[Any]) -> bool:
    """True if ``optimizer.step`` runs one of ``steps`` on ``optimizer``, without step pre-hooks."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if hooks or _global_optimizer_pre_hooks:
        return False
    step = optimizer.step
    if getattr(step, "__self__", None) is optimizer:
        return _inside_hooks(step.__func__) in steps  # type: ignore[attr-defined]
    if getattr(step, "__globals__", None) is not vars(lr_scheduler):
        return False
    # An LR scheduler's counter closes over the function and a weak reference to the optimizer.
    known = [cell.cell_contents for cell in step.__closure__ or ()]
    mine = any(isinstance(value, weakref.ref) and value() is optimizer for value in known)
    return mine and any(isinstance(value, FunctionType) and _inside_hooks(value) in steps for value in known)


def _has_own(optimizer: Optimizer, name: str) -> bool:
    """True if ``optimizer`` has a truthy attribute ``name`` that is not forwarded by ``__getattr__``."""
    owners = (optimizer, *type(optimizer).__mro__)
    return next((bool(vars(owner)[name]) for owner in owners if name in vars(owner)), False)


def takes_found_inf(optimizer: Optimizer) -> bool:
    """True if ``optimizer.step`` skips if its attribute ``found_inf`` is set, as torch's fused optimizers do.
    False for wrapped or replaced steps, as in :func:`is_ours`.
    """
    if is_fusedamps(optimizer) or not _has_own(optimizer, "_step_supports_amp_scaling"):
        return False
    if isinstance(optimizer, _TORCHS_FUSED) and not _runs(optimizer, _TORCHS_STEPS):
        return False
    return not _would_start_momentum(optimizer)


def by_hand(optimizer: Optimizer) -> tuple[inputs.Number | None, inputs.Number | None]:
    """Return ``found_inf`` and ``grad_scale`` that the user set on an optimizer whose step reads them, or
    None."""
    obeys = is_fusedamps(optimizer) or _has_own(optimizer, "_step_supports_amp_scaling")
    return inputs.by_hand(optimizer) if obeys else (None, None)


def is_legacy(optimizer: Optimizer) -> bool:
    """True if ``optimizer.step`` takes the scaler as an argument, which torch deprecates but supports."""
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and "grad_scaler" in inspect.signature(optimizer.step).parameters
    )


def _would_start_momentum(optimizer: Optimizer) -> bool:
    return isinstance(optimizer, torch.optim.SGD) and any(
        group["momentum"] != 0
        and param.grad is not None
        and optimizer.state.get(param, {}).get("momentum_buffer") is None
        for group in optimizer.param_groups
        for param in group["params"]
    )
