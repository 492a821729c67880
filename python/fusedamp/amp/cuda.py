"""GradScaler with the signature of torch.cuda.amp.GradScaler."""

from __future__ import annotations

from typing import Unpack

from . import grad_scaler
from .limits import ScaleLimits

__all__ = ["GradScaler"]


class GradScaler(grad_scaler.GradScaler):
    """:class:`fusedamp.GradScaler` for ``device="cuda"``, with ``init_scale`` first; not deprecated."""

    def __init__(
        self,
        init_scale: float = 2.0**16,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
        enabled: bool = True,
        **scale_limits: Unpack[ScaleLimits],
    ) -> None:
        super().__init__(
            "cuda", init_scale, growth_factor, backoff_factor, growth_interval, enabled, **scale_limits
        )
