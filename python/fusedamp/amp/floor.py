"""Notices an overflow at the lowest allowed scale without making the host wait for the device."""

from __future__ import annotations

import torch
from torch import Tensor

from .gradients import has_value


class FloorWatch:
    """Looks at the scale only when it can have reached the floor.

    One update lowers the scale by one backoff factor at most, so one look tells how many updates need none:
    with the default floor and 2**16, the next look is due after 142 updates. On CUDA a look is a copy to
    pinned memory that a later update finds done; while a graph is captured there is none.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Look again at the next update: the scale or its bounds were set by hand."""
        self._at_least = 0.0
        self._pending: tuple[torch.cuda.Event, Tensor, float] | None = None

    def stuck(self, scale: Tensor, found_inf: Tensor, floor: float, backoff: float) -> bool:
        """Whether an overflow at the floor has been seen; call it before each update of the scale."""
        if scale.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if self._pending is not None:
            return self._poll(floor, backoff)
        if self._at_least > floor:
            self._at_least *= backoff
            return False
        if not has_value(scale):
            return False
        look = torch.stack((scale.reshape(()), found_inf.reshape(())))
        if scale.is_cuda:
            host = torch.empty(2, device="cpu", pin_memory=True).copy_(look, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._pending = (event, host, backoff)
            return False
        return self._judge(look, floor, backoff)

    def _poll(self, floor: float, backoff: float) -> bool:
        assert self._pending is not None
        event, host, since = self._pending
        since *= backoff
        if not event.query():  # type: ignore[no-untyped-call]
            self._pending = (event, host, since)
            return False
        self._pending = None
        return self._judge(host, floor, since)

    def _judge(self, look: Tensor, floor: float, since: float) -> bool:
        scale, found_inf = look.tolist()
        self._at_least = scale * since
        return bool(scale <= floor and found_inf != 0)
