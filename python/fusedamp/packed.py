"""Lists of tensors as lists of addresses, which the ops take at a tenth of the host time.

Handing a tensor to an op costs about 0.5 us of host time, and a step needs six per parameter. Here the
fields that an op needs are read in bulk instead. Addresses are read anew at every call, so none can be
stale; whatever is not plain (a subclass, a sparse, meta or strided-with-gaps tensor, several devices) makes
these functions return None or False, and the caller hands over the tensors themselves to an op that checks
everything.
"""

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from . import _C, arguments

# int64 [3, n]: addresses, numels and dtype codes (csrc/engine/dtype.h) of n plain tensors on one device.
Fields = bytearray

_WORD = 8  # bytes
_FLOAT64 = 3  # the code of float64
_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
# Where torch has no such interface, or a later one, all tensors are handed to the ops as they are.
_probes = [
    torch.zeros(shape, dtype=dtype, device="cpu")
    for shape in ((), (3, 2))
    for dtype in (torch.half, torch.double)
]
_negated = [(probe, torch._neg_view(probe)) for probe in _probes] if hasattr(torch, "_neg_view") else []
_CAN_READ = _exchange is not None and _C.bind_tensors(Tensor, Parameter, _exchange, _negated)


def _can_read() -> bool:
    return _CAN_READ and not torch.compiler.is_compiling()


def grads_of(params: list[Tensor]) -> tuple[list[Any], int] | None:
    """The ``.grad`` of each of ``params``, and how many are None; None where one is no plain tensor."""
    return _C.grads_of(params) if _can_read() else None


def versions(tensors: list[Tensor]) -> bytes | list[int] | None:
    """The version counters of ``tensors``, to be compared with others; None where one has no counter, as
    those made in inference mode."""
    try:
        return _C.versions(tensors) if _can_read() else list(map(attrgetter("_version"), tensors))
    except RuntimeError:
        if any(tensor.is_inference() for tensor in tensors):
            return None
        raise


def read(tensors: Sequence[Any], stored: bool = False) -> Fields | None:
    """The fields of ``tensors``, or None where one of them is not a plain contiguous floating-point tensor
    with memory (or with ``stored`` one of 8- or 16-bit integers), or there are none."""
    if not _can_read():
        return None
    return _C.read_fields(tensors if type(tensors) is list else list(tensors), stored)


def rows(fields: Fields) -> Tensor:
    """``fields`` as an int64 tensor [3, n] that shares their memory; the op _packed_grad_stats takes it."""
    return torch.frombuffer(fields, dtype=torch.int64).view(3, -1)


def holds_float64(fields: Fields) -> bool:
    codes = fields[2 * len(fields) // 3 :]  # of words whose other bytes are 0
    return _FLOAT64 in codes


class StepTable:
    """The addresses of the parameters of one step op and of what belongs to them, while none of their memory
    moves.

    Keeps no tensor alive but ``params``, which :meth:`let_go` gives up until the next :meth:`take`.

    Args:
        op: the step op.
        params, masters, states, steps: as the op's, which has accepted them with gradients like ``grads``.
        grads: fields of contiguous gradients of contiguous parameters.
        scales, seeds: as the op's; no seeds stand for 0.
    Raises: ValueError where one of the tensors is not plain.
    """

    def __init__(
        self,
        op: str,
        params: list[Tensor],
        masters: list[Tensor],
        states: list[Tensor],
        steps: list[Tensor],
        grads: Fields,
        scales: Sequence[Tensor] = (),
        seeds: Sequence[int] = (),
    ) -> None:
        self.op, self.states_per_param = op, len(states) // len(params)
        self.params, state = params, [*steps, *masters, *states, *scales]
        fields, state_fields, param_fields = (
            read([*params, *state], stored=True),
            read(state, stored=True),
            read(params),
        )
        if fields is None or state_fields is None or param_fields is None:
            raise ValueError(f"[{op}] not all tensors are plain; expected contiguous ones on one device")
        self.state_fields, self.param_fields = state_fields, param_fields
        self._grad_kinds = grads[len(params) * _WORD :]
        self._rows = self._packed_rows(rows(fields), rows(grads), bool(masters), seeds)

    def grads(self) -> Fields | None:
        """The fields of the parameters' gradients; None where these or the parameters differ from the first
        ones in more than values, and the addresses of gradients.
        """
        grads = _C.read_grads(self.params, self.param_fields) if _can_read() else None
        return grads if grads is not None and grads[len(self.params) * _WORD :] == self._grad_kinds else None

    def has_same_state(self, state: list[Tensor]) -> bool:
        """Whether steps, masters, states and scales are where they were, and step counts are counts (as far
        as the host can see).
        """
        counts = len(self.params) if self.params[0].device.type == "cpu" else 0
        return _C.same_fields(state, self.state_fields) and _C.are_counts(self.state_fields, counts)

    def let_go(self) -> None:
        self.params = []

    def take(self, params: list[Tensor]) -> None:
        """Go on with ``params``, which :meth:`grads` compares with those that were given up."""
        self.params = params

    def launch(self, grads: Fields, scalars: dict[str, Any]) -> None:
        """The step, on what `grads` has just returned."""
        try:
            torch.ops.fusedamp._packed_step_(
                self._rows, rows(grads)[0], self.params[0], self.op, self.states_per_param, **scalars
            )
        except RuntimeError as error:
            if (complaint := arguments.complaint(self.op, error)) is None:
                raise
            raise complaint from error
        torch.autograd.graph.increment_version(self.params)  # nobody differentiates through our states

    def _packed_rows(self, fields: Tensor, grads: Tensor, has_masters: bool, seeds: Sequence[int]) -> Tensor:
        addresses, _, codes = fields.view(3, -1, len(self.params))
        nothing = torch.zeros_like(addresses[0])
        first = 2 + has_masters
        middle, states = first + self.states_per_param, [nothing] * 3
        scales = states.copy()
        states[: self.states_per_param] = addresses[first:middle]
        scales[: len(addresses) - middle] = addresses[middle:]
        # Without a master, or without states, the type says nothing and is read by nobody.
        master_code, state_code = codes[2 if has_masters else 0], codes[first if self.states_per_param else 1]
        kinds = codes[0] | grads[2] << 8 | master_code << 16 | state_code << 24
        masters = addresses[2] if has_masters else nothing
        seed = torch.tensor(seeds, device="cpu") if seeds else nothing  # whatever the default device is
        return torch.stack([addresses[0], masters, *states, *scales, addresses[1], grads[1], seed, kinds], 1)
