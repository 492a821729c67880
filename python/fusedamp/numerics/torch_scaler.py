"""Hears from torch's loss scaler, which tells an optimizer nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..amp.flags import combine
from ..ops.observers import observer_of

# Each step of torch's scaler calls it once: to unscale, or to check gradients of torch's fused optimizers.
_METHOD = "_unscale_grads_"


class _Listening:
    """The scaler's method in its place, which also reads the gradients of watched optimizers before.

    In a pickle or copy of the scaler it is the method.
    """

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler, self._method = scaler, getattr(scaler, _METHOD)
        self.watches = 0

    def __call__(self, optimizer: Optimizer, inv_scale: Tensor, *args: Any, **kwargs: Any) -> Any:
        watch: Any = observer_of(optimizer)
        if watch is None:
            return self._method(optimizer, inv_scale, *args, **kwargs)
        scale = self._scaler._scale
        assert scale is not None
        watch.read_scaled(scale.double().reciprocal().float(), scale)
        flags = self._method(optimizer, inv_scale, *args, **kwargs)
        if flags:
            watch.found(combine(flags.values(), scale.device))
        return flags

    def __reduce__(self) -> Any:
        return getattr, (self._scaler, _METHOD)


class Handle:
    """Ends the listening of one watch."""

    def __init__(self, scaler: torch.amp.GradScaler) -> None:
        self._scaler: torch.amp.GradScaler | None = scaler

    def remove(self) -> None:
        scaler, self._scaler = self._scaler, None
        if scaler is None or not isinstance(listening := vars(scaler).get(_METHOD), _Listening):
            return
        listening.watches -= 1
        if not listening.watches:
            delattr(scaler, _METHOD)


def listen(scaler: torch.amp.GradScaler) -> Handle:
    """Let watches of optimizers that ``scaler`` steps know of its steps; returns a handle."""
    if not isinstance(vars(scaler).get(_METHOD), _Listening):
        setattr(scaler, _METHOD, _Listening(scaler))
    getattr(scaler, _METHOD).watches += 1
    return Handle(scaler)
