"""Lists of tensors as lists of addresses, which the ops take at a tenth of the host time.

Handing a tensor to an op costs about 0.5 us of host time, and a step needs six per parameter. Here the
fields that an op needs are read in bulk instead. Addresses are read anew at every call, so none can be
stale; whatever is not plain (a subclass, a sparse, meta or strided-with-gaps tensor, several devices) makes
these functions return None or False, and the caller hands over the tensors themselves to an op that checks
everything.
"""

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _C

# int64 [3, n]: addresses, numels and dtype codes (csrc/engine/dtype.h) of n plain tensors on one device.
Fields = bytearray

WORD = 8  # bytes
_FLOAT64 = 3  # the code of float64
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
# Where torch has no such interface, or a later one, all tensors are handed to the ops as they are.
_probes = [
    torch.zeros(shape, dtype=dtype, device="cpu")
    for shape in ((), (3, 2))
    for dtype in (torch.half, torch.double)
]
_negated = [(probe, torch._neg_view(probe)) for probe in _probes] if hasattr(torch, "_neg_view") else []
_leaves = [probe.clone().requires_grad_() for probe in (*_probes, *_probes)]
for _leaf in _leaves[: len(_probes)]:
    _leaf.grad = _leaf.detach().clone().add_(1)
# Without a global lock another thread could free what is read, and reference counts tell nothing.
HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
_CAN_READ = (
    HAS_GIL and _exchange is not None and _C.bind_tensors(Tensor, Parameter, _exchange, _negated, _leaves)
)


def how_read() -> str:
    """How the host learns the addresses of many tensors, and why not faster; for ``fusedamp info``."""
    if _CAN_READ:
        return "torch's C functions" if _C.reads_directly() else "DLPack (torch's C functions were not found)"
    why = (
        "torch has no DLPack exchange interface that is known"
        if HAS_GIL
        else "Python runs without its global lock"
    )
    return f"one by one, which costs about 0.5 us per tensor and step ({why})"


def can_read() -> bool:
    return _CAN_READ and not torch.compiler.is_compiling()


def grads_of(params: list[Tensor]) -> tuple[list[Any], int] | None:
    """The ``.grad`` of each of ``params``, and how many are None; None where one is no plain tensor."""
    return _C.grads_of(params) if can_read() else None


def versions(tensors: list[Tensor]) -> bytes | list[int] | None:
    """The version counters of ``tensors``, to be compared with others; None where one has no counter, as
    those made in inference mode."""
    try:
        return _C.versions(tensors) if can_read() else list(map(attrgetter("_version"), tensors))
    except RuntimeError:
        if any(tensor.is_inference() for tensor in tensors):
            return None
        raise


def read(tensors: Sequence[Any], stored: bool = False) -> Fields | None:
    """The fields of ``tensors``, or None where one of them is not a plain contiguous floating-point tensor
    with memory (or with ``stored`` one of 8- or 16-bit integers), or there are none."""
    if not can_read():
        return None
    fields: Fields | None = _C.read_fields(tensors if type(tensors) is list else list(tensors), stored)
    return fields


def rows(fields: Fields) -> Tensor:
    """``fields`` as an int64 tensor [3, n] that shares their memory; the op _packed_grad_stats takes it."""
    return torch.frombuffer(fields, dtype=torch.int64).view(3, -1)


def holds_float64(fields: Fields) -> bool:
    codes = fields[2 * len(fields) // 3 :]  # of words whose other bytes are 0
    return _FLOAT64 in codes
