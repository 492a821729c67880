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
PLAIN = {Tensor, Parameter}
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
    codes: list[int]


def read(tensors: Sequence[Any]) -> Fields | None:
    """The fields of ``tensors``, or None where one of them is not a plain contiguous floating-point tensor
    with memory."""
    if not tensors or torch.compiler.is_compiling() or not PLAIN.issuperset(map(type, tensors)):
        return None
    try:
        if not all(map(_contiguous, tensors)) or len(set(map(_device, tensors))) != 1:
            return None
    except RuntimeError:  # sparse tensors have no is_contiguous
        return None
    addresses, numels = list(map(_address, tensors)), list(map(_numel, tensors))
    try:
        codes = list(map(_CODES.__getitem__, map(_dtype, tensors)))
    except KeyError:
        return None
    if tensors[0].device.type not in ("cpu", "cuda"):
        return None
    if 0 in addresses and any(n and not a for n, a in zip(numels, addresses, strict=True)):
        return None  # freed
    if 1 in numels and any(n == 1 and t.is_neg() for n, t in zip(numels, tensors, strict=True)):
        return None  # a lazy negation; only views of complex numbers have it, which are contiguous if single
    return Fields(addresses, numels, codes)


def pack(values: Sequence[int]) -> Tensor:
    """An int64 tensor on the CPU."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)


class StepTable:
    """The parameters of one step op with what belongs to them, for as long as none of their memory moves.

    Args:
        op: the step op.
        params, masters, states, steps: as the op's, which has accepted them with gradients like ``grads``.
        grads: contiguous gradients of contiguous parameters.
    """

    def __init__(
        self,
        op: str,
        params: list[Tensor],
        masters: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
        grads: Fields,
    ) -> None:
        self.op, self.states_per_param = op, len(states) // len(params)
        self.params, self._fixed = params, [*params, *masters, *states, *steps]
        self._addresses = list(map(_address, self._fixed))
        self._numels, self._codes, self._dtypes = grads.numels, grads.codes, list(map(_dtype, params))
        self._rows = self._packed_rows(grads)

    def accepts(self, grads: Fields) -> bool:
        """Whether a step with ``grads`` differs from the first in nothing but their addresses and values.

        A parameter whose size was changed in place shows in its gradient's.
        """
        return (
            grads.numels == self._numels
            and grads.codes == self._codes
            and list(map(_address, self._fixed)) == self._addresses
            and list(map(_dtype, self.params)) == self._dtypes
            and all(map(_contiguous, self._fixed))
        )

    def launch(self, grads: Fields, scalars: dict[str, Any]) -> None:
        """The step, on gradients that were accepted just now."""
        torch.ops.fusedamp.packed_step_(
            self._rows, pack(grads.addresses), self.params[0], self.op, self.states_per_param, **scalars
        )
        torch.autograd.graph.increment_version(self.params)  # nobody differentiates through our states

    def _packed_rows(self, grads: Fields) -> Tensor:
        n = len(self.params)
        columns = [self._addresses[i : i + n] for i in range(0, len(self._addresses), n)]
        has_masters = len(columns) == self.states_per_param + 3
        nothing = [0] * n
        params, masters = columns[0], columns[1] if has_masters else nothing
        states = columns[1 + has_masters : -1]
        states += [nothing] * (3 - len(states))
        codes = [_CODES[p.dtype] | g << 8 for p, g in zip(self.params, grads.codes, strict=True)]
        rows = [params, masters, *states, columns[-1], grads.numels, codes]
        return torch.tensor(rows, device="cpu").t().contiguous()  # whatever the user's default device is
