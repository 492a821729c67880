"""The copies of a CUDA device, by the calls that they make: streams that wait, and page-locked memory.

Values are tested with a pretended device, and on a GPU by ``make evidence``.
"""

import gc
import mmap
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from fusedamp.optim.offload.link import CudaLink, Link, link_to

pytestmark = pytest.mark.host


@pytest.fixture
def calls(monkeypatch):
    """What is called of torch.cuda, in order."""
    made = []

    def noting(name, result=None):
        def call(*arguments):
            made.append((name, *arguments))
            return result

        return call

    class Stream:
        def __init__(self, device):
            made.append(("new stream", device))

        def wait_stream(self, other):
            made.append(("wait_stream", self, other))

        def record_event(self):
            made.append(("record", self))
            return SimpleNamespace(synchronize=noting("synchronize event"))

    @contextmanager
    def on(stream):
        made.append(("enter", stream))
        yield
        made.append(("leave", stream))

    main = SimpleNamespace(wait_event=noting("wait_event"))
    runtime = SimpleNamespace(
        cudaHostRegister=noting("register", 0), cudaHostUnregister=noting("unregister", 0)
    )
    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: runtime)
    monkeypatch.setattr(torch.cuda, "check_error", noting("check"))
    monkeypatch.setattr(torch.cuda, "synchronize", noting("synchronize"))
    return SimpleNamespace(made=made, main=main)


def test_copies_wait_for_the_device_and_the_device_for_them(calls):
    device = torch.device("cuda", 1)
    link = CudaLink(device)
    streams = list(link._streams.values())
    assert calls.made == [("new stream", device)] * 2
    for direction, stream in zip(("down", "up"), streams, strict=True):
        calls.made.clear()
        done = link.run(direction, lambda: calls.made.append(("work",)))
        assert calls.made == [
            ("wait_stream", stream, calls.main),
            ("enter", stream),
            ("work",),
            ("record", stream),
            ("leave", stream),
        ]
        calls.made.clear()
        done.wait()
        link.follow(done)
        assert calls.made == [("synchronize event",), ("wait_event", done.event)]
    calls.made.clear()
    link.meet("down")
    assert calls.made == [("wait_stream", streams[0], calls.main)]
    link.run("down", lambda: None)
    assert ("new stream", device) not in calls.made  # a stream per copy would grow the allocator's pools


@pytest.mark.parametrize("size", [1, 4096, 10_000])
def test_host_memory_is_page_locked_until_it_is_freed(size, calls):
    device = torch.device("cuda", 0)
    link = CudaLink(device)
    calls.made.clear()
    memory = link.host_bytes(size)
    assert memory.shape == (size,)
    assert memory.dtype == torch.uint8
    (name, address, locked, flags), check = calls.made
    assert (name, address, flags, check) == ("register", memory.data_ptr(), 0, ("check", 0))
    assert address % mmap.PAGESIZE == locked % mmap.PAGESIZE == 0
    assert size <= locked < size + mmap.PAGESIZE
    calls.made.clear()
    view = memory[:1]
    del memory
    gc.collect()
    assert calls.made == [("synchronize", device), ("unregister", address)]  # no copy uses it any more
    del view


def test_empty_memory_is_not_registered(calls):
    link = CudaLink(torch.device("cuda", 0))
    calls.made.clear()
    assert link.host_bytes(0).numel() == 0
    assert calls.made == []


def test_memory_that_cannot_be_locked_raises(calls, monkeypatch):
    def fail(code):
        raise RuntimeError(f"CUDA error {code}")

    monkeypatch.setattr(torch.cuda, "check_error", fail)
    with pytest.raises(RuntimeError, match="CUDA error 0"):
        CudaLink(torch.device("cuda", 0)).host_bytes(8)


def test_links(calls):
    assert type(link_to(torch.device("cpu"))) is Link
    assert type(link_to(torch.device("cuda", 0))) is CudaLink
