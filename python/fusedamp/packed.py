"""Lists of tensors as lists of addresses, which the ops take at a tenth of the host time.

Handing a tensor to an op costs about 0.5 us of host time, and a step needs six per parameter. Here the
fields that an op needs are read with bulk calls instead. Addresses are read anew at every call, so none can
be stale; whatever is not plain (a subclass, a sparse, meta or strided-with-gaps tensor, several devices)
makes these functions return None or False, and the caller hands over the tensors themselves to an op that
checks everything.
"""

from array import array
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

_CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
}  # as in csrc/engine/dtype.h
_PLAIN = {Tensor, Parameter}
_address, _numel, _contiguous, _device = (
    Tensor.data_ptr,
    Tensor.numel,
    Tensor.is_contiguous,
    Tensor.get_device,
)
_dtype = attrgetter("dtype")


class Fields(NamedTuple):
    """What the ops need of contiguous tensors on one device."""

    addresses: list[int]
    numels: list[int]
    codes: list[int | None]


def read(tensors: Sequence[Tensor]) -> Fields | None:
    """The fields of ``tensors``, or None where one of them is not a plain contiguous floating-point tensor
    with memory."""
    if not tensors or torch.compiler.is_compiling() or not _PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        if not all(map(_contiguous, tensors)) or len(set(map(_device, tensors))) != 1:
            return None
    except RuntimeError:  # sparse tensors have no is_contiguous
        return None
    numels, codes = list(map(_numel, tensors)), list(map(_CODES.get, map(_dtype, tensors)))
    addresses = list(map(_address, tensors))
    if None in codes or tensors[0].device.type not in ("cpu", "cuda"):
        return None
    if 0 in addresses and any(n and not a for n, a in zip(numels, addresses, strict=True)):
        return None  # freed
    return Fields(addresses, numels, codes)


def pack(values: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


class StepTable:
    """The parameters of one step op with what belongs to them, for as long as none of their memory moves."""

    def __init__(
        self, op: str, params: list[Tensor], masters: list[Tensor], states: list[Tensor], steps: list[Tensor]
    ):
        self.op, self.states_per_param = op, len(states) // len(params)
        self.params, self.fixed = params, [*params, *masters, *states, *steps]
        self.addresses = list(map(_address, self.fixed))
        self._grads: Fields | None = None  # of the last step
        self._rows = torch.empty(0)

    def launch(self, grads: list[Tensor], scalars: dict[str, Any]) -> bool:
        """One step with ``grads``; False, and nothing done, where something moved or is not plain.

        The first call needs gradients that the list op has accepted with the same tensors.
        """
        fields = read(grads)
        if fields is None or list(map(_address, self.fixed)) != self.addresses:
            return False
        known = self._grads
        if known is None or known.numels != fields.numels or known.codes != fields.codes:
            if known is not None or not self._fits(fields):
                return False
            self._rows = self._packed_rows(fields)
        self._grads = fields
        torch.ops.fusedamp.packed_step_(
            self._rows, pack(fields.addresses), self.params[0], self.op, self.states_per_param, **scalars
        )
        torch.autograd.graph.increment_version(self.fixed)
        return True

    def _fits(self, grads: Fields) -> bool:
        params = read(self.params)
        return params is not None and params.numels == grads.numels

    def _packed_rows(self, grads: Fields) -> Tensor:
        n = len(self.params)
        columns = [self.addresses[i : i + n] for i in range(0, len(self.addresses), n)]
        has_masters = len(columns) == self.states_per_param + 3
        nothing = [0] * n
        params, masters = columns[0], columns[1] if has_masters else nothing
        states = columns[1 + has_masters : -1]
        states += [nothing] * (3 - len(states))
        codes = [_CODES[p.dtype] | g << 8 for p, g in zip(self.params, grads.codes, strict=True)]
        return torch.tensor([params, masters, *states, columns[-1], grads.numels, codes]).t().contiguous()
