"""What observes the gradients and steps of an optimizer, such as a watch of :mod:`fusedamp.numerics`.

Scalers and optimizers do not know it; they meet here. An observer is an attribute of the optimizer, which
wrappers copy or forward, and which torch leaves out of pickles and copies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .gradients import Numerics

_NAME = "_fusedamp_observer"


class Tally(NamedTuple):
    """Where a step op counts its updates, and whether it does."""

    updates: Tensor
    """float64, [n, 4]: as the step ops have it."""
    due: Tensor
    """int32, 0-dim."""


class Reader(Protocol):
    """Positions are those of parameters among all of the optimizer's; rows are in their order."""

    def numerics(self, device: torch.device, positions: Sequence[int]) -> Numerics:
        """Return where the check of gradients on one device counts. Checks may be repeated in a step."""

    def checked(self, device: torch.device, squares: Callable[[], Tensor]) -> None:
        """The last check on ``device`` is done. ``squares()``: float64, [n], of unscaled gradients."""


class Observer(Reader, Protocol):
    def begin(self) -> None:
        """A scaler begins a step, which it will :meth:`end` or :meth:`abort`."""

    def abort(self) -> None:
        """The scaler's step raised an error."""

    def activations(self, device: torch.device) -> Tensor | None:
        """Return the largest |scaled gradient| of activations in the current step: float64, 0-dim, on
        ``device``; None if they are not observed, or have none."""

    def tally(self, device: torch.device, positions: Sequence[int]) -> Tally | None:
        """Return where a step op on one device counts; None if it need not."""

    def end(self, found_inf: Tensor | None, scale: Tensor | None) -> None:
        """The step is over, skipped if ``found_inf`` is not 0."""

    def before_step(self) -> None:
        """The optimizer begins its step with unscaled gradients, called by a scaler or not."""

    def after_step(self) -> None:
        """The optimizer's step is over."""


def observer_of(optimizer: Any) -> Observer | None:
    return getattr(optimizer, _NAME, None)


def observe(optimizer: Any, observer: Observer) -> None:
    """Let ``observer`` be the only one of ``optimizer``."""
    setattr(optimizer, _NAME, observer)


def stop_observing(optimizer: Any, observer: Observer) -> None:
    if vars(optimizer).get(_NAME) is observer:
        delattr(optimizer, _NAME)
