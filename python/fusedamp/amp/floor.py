"""Detects an overflow at the lowest allowed scale without a host sync."""

from __future__ import annotations

import torch
from torch import Tensor

from .flags import has_value


class FloorWatch:
    """Reads the scale only when it may have reached the floor.

    One update lowers the scale by at most one backoff factor, so each reading tells how many updates need no
    further one: with the default floor and a scale of 2**16, the next is due after 142 updates. On CUDA a
    reading is an asynchronous copy to pinned memory, used by a later update. There is none during graph
    capture.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Read the scale at the next update, because it or its bounds were set by hand."""
        self._at_least = 0.0
        self._pending: tuple[torch.cuda.Event, Tensor, float] | None = None

    def stuck(self, scale: Tensor, found_inf: Tensor, floor: float, backoff: float) -> bool:
        """True if an overflow at the floor was detected; call before each update of the scale."""
        if scale.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if self._pending is not None:
            return self._poll(floor, backoff)
        if self._at_least > floor:
            self._at_least *= backoff
            return False
        if not has_value(scale):
            return False
        reading = torch.stack((scale.reshape(()), found_inf.reshape(())))
        if scale.is_cuda:
            host = torch.empty(2, device="cpu", pin_memory=True).copy_(reading, non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            self._pending = (event, host, backoff)
            return False
        return self._judge(reading, floor, backoff)

    def _poll(self, floor: float, backoff: float) -> bool:
        assert self._pending is not None
        event, host, since = self._pending
        since *= backoff
        if not event.query():  # type: ignore[no-untyped-call]
            self._pending = (event, host, since)
            return False
        self._pending = None
        return self._judge(host, floor, since)

    def _judge(self, reading: Tensor, floor: float, since: float) -> bool:
        scale, found_inf = reading.tolist()
        self._at_least = scale * since
        return bool(scale <= floor and found_inf != 0)
