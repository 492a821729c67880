"""Passes lists of tensors to the ops as lists of addresses, at a tenth of the host time.

Passing a tensor to an op costs about 0.5 us of host time, and a step needs six per parameter. These functions
read the fields that an op needs in bulk instead. Addresses are read again at every call, so none is stale.
For tensors that are not plain (a subclass, a sparse or meta tensor, one with gaps, several devices) they
return None or False, and the caller passes the tensors to an op that checks them.
"""

import sys
from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import _C

# int64 [3, n]: addresses, numels and dtype codes (csrc/include/fusedamp/rows.h) of n plain tensors on one
# device.
Fields = bytearray

WORD = 8  # bytes
_FLOAT64 = 3  # the dtype code of float64
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
# Without this interface, or with an unknown version of it, ops get the tensors themselves.
_probes = [
    torch.zeros(shape, dtype=dtype, device="cpu")
    for shape in ((), (3, 2))
    for dtype in (torch.half, torch.double)
]
_negated = [(probe, torch._neg_view(probe)) for probe in _probes] if hasattr(torch, "_neg_view") else []
_leaves = [probe.clone().requires_grad_() for probe in (*_probes, *_probes)]
for _leaf in _leaves[: len(_probes)]:
    _leaf.grad = _leaf.detach().clone().add_(1)
# Without the GIL another thread could free a tensor while it is read, and reference counts are unreliable.
HAS_GIL: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
_CAN_READ = (
    HAS_GIL and _exchange is not None and _C.bind_tensors(Tensor, Parameter, _exchange, _negated, _leaves)
)


def how_read() -> str:
    """Describe how the host reads the addresses of many tensors, for ``fusedamp info``."""
    if _CAN_READ:
        return "torch's C functions" if _C.reads_directly() else "DLPack (torch's C functions were not found)"
    why = "torch has no known DLPack exchange interface" if HAS_GIL else "Python runs without the GIL"
    return f"one by one, which costs about 0.5 us per tensor and step ({why})"


def can_read() -> bool:
    return _CAN_READ and not torch.compiler.is_compiling()


def grads_of(params: list[Tensor]) -> tuple[list[Any], int] | None:
    """Return the ``.grad`` of each of ``params`` and the number that are None; None if one is not a plain
    tensor."""
    return _C.grads_of(params) if can_read() else None


def versions(tensors: list[Tensor]) -> bytes | list[int] | None:
    """Return the version counters of ``tensors``, for comparison; None if one has no counter, because it was
    created in inference mode."""
    try:
        return _C.versions(tensors) if can_read() else list(map(attrgetter("_version"), tensors))
    except RuntimeError:
        if any(tensor.is_inference() for tensor in tensors):
            return None
        raise


def read(tensors: Sequence[Any], stored: bool = False) -> Fields | None:
    """Read the fields of ``tensors``; None if the list is empty or one is not a plain contiguous
    floating-point tensor with memory (with ``stored``, also one of 8- or 16-bit integers)."""
    if not can_read():
        return None
    fields: Fields | None = _C.read_fields(tensors if type(tensors) is list else list(tensors), stored)
    return fields


def rows(fields: Fields) -> Tensor:
    """View ``fields`` as an int64 tensor [3, n], as the op _packed_grad_stats takes it."""
    return torch.frombuffer(fields, dtype=torch.int64).view(3, -1)


def holds_float64(fields: Fields) -> bool:
    codes = fields[2 * len(fields) // 3 :]  # one word each, whose other bytes are 0
    return _FLOAT64 in codes
