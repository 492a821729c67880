"""Asynchronous copies between the memory of one device and the host's."""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ..._C import advise_huge_pages

Direction = Literal["down", "up"]  # down: from the device to the host


class Done:
    """The end of some copies; here they have ended already."""

    def wait(self) -> None:
        """Make the host wait for it."""


class Link:
    """The copies of a CPU, whose tensors are on the host already: they are made at once.

    A link has two queues, one per direction. Work in a queue begins after the work that the device had been
    given when it was queued, and after the earlier work in the same queue. Work consists of operations on
    the device and of :meth:`cross`. It changes no version counter: the caller does when it queues.
    """

    pools = False  # whether one copy of many small tensors is faster than one copy for each

    def host_bytes(self, size: int) -> Tensor:
        """Return new memory on the host that the device can reach directly, while this tensor exists: uint8,
        not initialized."""
        memory = torch.empty(size, dtype=torch.uint8, device="cpu")
        advise_huge_pages(memory.data_ptr(), size)
        return memory

    def meet(self, direction: Direction) -> None:
        """Make later work in the queue begin after the device's work so far: of each stream that makes
        gradients, of which :meth:`run` sees the last."""

    def run(self, direction: Direction, work: Callable[[], None]) -> Done:
        """Queue ``work``. What it writes may be read after the result's ``wait``, or after :meth:`follow`."""
        work()
        return Done()

    def follow(self, done: Done) -> None:
        """Make the device wait for ``done`` before any work that it gets from now on."""

    def cross(self, target: Tensor, source: Tensor) -> None:
        """Copy between device and host. Both are flat, contiguous and of one dtype."""
        target.copy_(source, non_blocking=True)


class _Event(Done):
    def __init__(self, event: torch.cuda.Event) -> None:
        self.event = event

    def wait(self) -> None:
        self.event.synchronize()


class CudaLink(Link):
    """The copies of a CUDA device: one stream per direction, for as long as the link exists (a stream per
    copy would give each its own pool of memory), and page-locked host memory."""

    pools = True

    def __init__(self, device: torch.device) -> None:
        self._device = device
        stream: Callable[[torch.device], torch.cuda.Stream] = torch.cuda.Stream
        self._streams = {name: stream(device) for name in ("down", "up")}

    def host_bytes(self, size: int) -> Tensor:
        # Whole pages of our own: the sizes of torch's page-locked memory are powers of two, a third more
        # than needed on average.
        memory = super().host_bytes(size + 2 * mmap.PAGESIZE)
        start = -memory.data_ptr() % mmap.PAGESIZE
        memory = memory[start : start + size]
        if size:
            address, pages = memory.data_ptr(), -(-size // mmap.PAGESIZE)
            register = torch.cuda.cudart().cudaHostRegister  # type: ignore[no-untyped-call]
            torch.cuda.check_error(int(register(address, pages * mmap.PAGESIZE, 0)))
            weakref.finalize(memory, self._release, address).atexit = False
        return memory

    def _release(self, address: int) -> None:
        torch.cuda.synchronize(self._device)  # a copy may still use the memory
        torch.cuda.cudart().cudaHostUnregister(address)  # type: ignore[no-untyped-call]

    def meet(self, direction: Direction) -> None:
        self._streams[direction].wait_stream(torch.cuda.current_stream(self._device))

    def run(self, direction: Direction, work: Callable[[], None]) -> Done:
        stream = self._streams[direction]
        self.meet(direction)
        with torch.cuda.stream(stream):
            work()
            return _Event(stream.record_event())

    def follow(self, done: Done) -> None:
        assert isinstance(done, _Event)
        torch.cuda.current_stream(self._device).wait_event(done.event)


def link_to(device: torch.device) -> Link:
    """Return a new link to ``device``, a CUDA device or the CPU."""
    return CudaLink(device) if device.type == "cuda" else Link()
