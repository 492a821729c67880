"""A device without a device: memory of its own, and copies that are made as late as their order allows.

What a program reads without waiting for it is missing, so a race shows in every run.
"""

from contextlib import contextmanager

import torch
from cases import make_params
from fusedamp import optim
from fusedamp.optim.offload.link import Done, Link


class _Job(Done):
    def __init__(self, link, direction, work, after):
        self.link, self.direction, self.work, self.after = link, direction, work, after

    def finish(self):
        work, self.work = self.work, None
        if work is not None:
            for earlier in self.after:
                earlier.finish()
            self.after = []
            self.link.perform(self.direction, work)

    wait = finish


class PretendLink(Link):
    """Args: memory: the device's. late: make copies as late as possible, else at once."""

    pools = True

    def __init__(self, memory, late=True):
        self.memory, self.late = memory, late
        self.content = memory.clone()
        self.moved = {"down": 0, "up": 0}  # bytes
        self.crossings = {"down": 0, "up": 0}
        self.host = []
        self._last = {}
        self._main = []  # what the device's own work waits for
        self._direction = None

    def host_bytes(self, size):
        memory = super().host_bytes(size).random_(1, 255)  # nothing is valid before it is copied
        self.host.append(memory)
        return memory

    def run(self, direction, work):
        job = _Job(self, direction, work, [*self._main, *self._last.get(direction, [])])
        self._last[direction] = [job]
        if not self.late:
            job.finish()
        return job

    def follow(self, done):
        self._main.append(done)

    def settle(self):
        """The device reaches the work that it gets now."""
        for job in self._main:
            job.finish()
        self._main = []
        self.check()

    def perform(self, direction, work):
        self.check()
        self._direction = direction
        work()
        self.content.copy_(self.memory)

    def check(self):
        assert torch.equal(self.content, self.memory), "the device's memory was written outside of a queue"

    @contextmanager
    def edits(self):
        """The device's program modifies weights."""
        self.settle()
        yield
        self.content.copy_(self.memory)

    def _is_on_host(self, tensor):
        start = tensor.untyped_storage().data_ptr()
        return any(memory.data_ptr() == start for memory in self.host)

    def cross(self, target, source):
        assert target.dtype == source.dtype
        assert target.dim() == source.dim() == 1
        assert target.is_contiguous()
        assert source.is_contiguous()
        assert not source.is_conj()  # it would be resolved on the host, before it is there
        on_host = (target, source)[self._direction == "up"]
        on_device = (source, target)[self._direction == "up"]
        assert not target.numel() or (self._is_on_host(on_host) and not self._is_on_host(on_device))
        self.moved[self._direction] += target.nbytes
        self.crossings[self._direction] += 1
        target.copy_(source)


class Memory:
    """The memory of a device: parameters live in it."""

    def __init__(self, size=1 << 20):
        self.bytes = torch.zeros(size, dtype=torch.uint8)
        self._end = 0

    def take(self, tensor):
        """Return a parameter in this memory with the values and strides of ``tensor``."""
        span = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
        size = max(span, 0) * tensor.element_size() if tensor.numel() else 0
        part = self.bytes[self._end : self._end + size].view(tensor.dtype)
        self._end += -(-size // 64) * 64
        place = part.as_strided(tensor.shape, tensor.stride())
        place.copy_(tensor.detach())
        return torch.nn.Parameter(place.data)  # with a version counter of its own


class Pretended(optim.Offloaded):
    """Offloaded from a pretended device, ``self.link``."""

    def __init__(self, memory, optimizer_class, params, late=True, **options):
        self.link = PretendLink(memory.bytes, late)
        super().__init__(optimizer_class, params, **options)

    def _new_link(self, device):
        return self.link


def twins(memory, params):
    """The same parameters in the memory of the device."""
    return [memory.take(param) for param in params]


def slopes(params, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator).mul(0.1).to(p.dtype) for p in params]


def loss_of(params, seed, poison=None):
    """A loss whose gradients are known, exact in the dtype of each parameter."""
    terms = [(p * s).double().sum() for p, s in zip(params, slopes(params, seed), strict=True)]
    if poison is not None:
        terms.append((params[poison] * torch.inf).double().sum())
    return torch.stack(terms).sum()


class Traffic:
    """Bytes per element that crossed within a block."""

    def __init__(self, optimizer):
        self.link = optimizer.link
        self.count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])

    def __enter__(self):
        self.before = dict(self.link.moved)
        return self

    def __exit__(self, *error):
        self.down, self.up = ((self.link.moved[k] - self.before[k]) / self.count for k in ("down", "up"))


def pair(shapes=((8, 4), (5,), ()), dtype=torch.bfloat16, kind=optim.AdamW, **options):
    """The same parameters twice: with a plain optimizer, and offloaded from a pretended device."""
    memory, params = Memory(), make_params(dtype, list(shapes))
    moved = twins(memory, params)
    return params, kind(params, **options), moved, Pretended(memory, kind, moved, **options)


def step(params, optimizer, seed):
    loss_of(params, seed).backward()
    optimizer.step()
    optimizer.zero_grad()
    if link := getattr(optimizer, "link", None):
        link.settle()
