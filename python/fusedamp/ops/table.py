"""The step of many tensors as tables of addresses, which are made once and used for many steps.

To hand a tensor to an op costs about 0.5 us of host time, and a step needs six per parameter. The tables are
the engines' own (csrc/engine/table.h): a row for each parameter, a group for each call that they stand for,
and the addresses of the gradients in a column of their own, as these are what moves.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _C
from ..tensors.addresses import WORD, Fields, read, rows
from . import checks
from .inputs import DeviceInputs
from .step import StepCall

_INT8, _UINT8, _FLOAT32, _FLOAT64 = 4, 5, 2, 3  # csrc/include/fusedamp/rows.h
_GROUP_WORDS = 13  # of a StepGroup: hyper [8], lr, lr_tensor, first, count, rule and dtype of lr
_LR, _LR_TENSOR, _FIRST, _COUNT, _RULE = range(8, _GROUP_WORDS)


class _Part(NamedTuple):
    """The rows of one call."""

    params: Fields
    states: Fields  # steps, masters, states, scales: one list after the other
    counts: int  # how many of these, at the beginning, are step counts that the host can read


class StepTable:
    """Calls of step ops on one device as one call of an op that knows addresses.

    It keeps no tensor alive but ``params``, which :meth:`let_go` gives up.

    Args:
        calls: what :func:`fusedamp.ops.step_lists` would be called with, one after the other.
    Raises: ValueError where one of their tensors is not plain and contiguous, or their device is another one.
    """

    def __init__(self, calls: Sequence[StepCall]) -> None:
        self.params: list[Tensor] = [param for call in calls for param in call.params]
        self.ops = tuple(dict.fromkeys(call.op for call in calls))
        grads = read([grad for call in calls for grad in call.grads])
        if grads is None or read(self.params) is None:
            raise ValueError(
                f"[{self.ops[0]}] not all tensors are plain; expected contiguous ones on one device"
            )
        self.grads = grads
        self.fields = rows(grads)  # the same memory
        self._column = self.fields[0]
        self.device = self.params[0].device
        self._like = torch.empty(0, device=self.device)  # requires no gradient, so autograd does nothing
        self.parts: list[_Part] = []
        memory = bytearray(len(calls) * _GROUP_WORDS * WORD)
        self._numbers, self._words = memoryview(memory).cast("d"), memoryview(memory).cast("q")
        self._groups = torch.frombuffer(memory, dtype=torch.int64).view(-1, _GROUP_WORDS)
        self._lrs: list[Tensor | None] = [None] * len(calls)  # learning rates that are read on the device
        first, made = 0, []
        for g, call in enumerate(calls):
            made.append(self._rows_of(call, g, self.fields[2, first : first + len(call.params)]))
            states = len(call.states_in_order()) // len(call.params)
            rule = torch.ops.fusedamp._rule_of(call.op, states)
            self._words[g * _GROUP_WORDS + _FIRST], self._words[g * _GROUP_WORDS + _COUNT] = (
                first,
                len(call.params),
            )
            self._words[g * _GROUP_WORDS + _RULE] = rule
            self.set_numbers(g, call.scalars)
            first += len(call.params)
        self._rows = torch.cat(made)
        self._do("_check_plan", self._rows, self._groups, self.params[0])

    def set_numbers(self, group: int, scalars: dict[str, Any]) -> None:
        """Take the learning rate and the hyper-parameters of ``ops.step_scalars`` for one of the calls."""
        at, lr_tensor = group * _GROUP_WORDS, scalars["lr_tensor"]
        for i, value in enumerate(scalars["hyper"]):
            self._numbers[at + i] = value
        self._numbers[at + _LR] = scalars["lr"]
        self._lrs[group] = lr_tensor
        self._words[at + _LR_TENSOR] = 0 if lr_tensor is None else lr_tensor.data_ptr()
        kind = _FLOAT32 if lr_tensor is None else self._kind_of_rate(lr_tensor)
        self._words[at + _RULE] = self._words[at + _RULE] & 0xFFFFFFFF | kind << 32

    def rate_address(self, group: int) -> int:
        """Where the learning rate of a call lies."""
        return self._groups.data_ptr() + (group * _GROUP_WORDS + _LR) * WORD

    def column_address(self, row: int) -> int:
        """Where the address of a gradient lies."""
        return self.fields.data_ptr() + row * WORD

    def has_same_states(self, part: int, tensors: list[Tensor]) -> bool:
        """Whether steps, masters, states and scales of a call are where they were, and step counts are counts
        (as far as the host can see).
        """
        known = self.parts[part]
        return bool(_C.same_fields(tensors, known.states) and _C.are_counts(known.states, known.counts))

    def written(self) -> Iterator[Fields]:
        """Where all lies that a step writes."""
        for part in self.parts:
            yield part.params
            yield part.states

    def let_go(self) -> None:
        self.params = []

    def step(
        self,
        params: list[Tensor],
        inputs: DeviceInputs,
        updates: Tensor | None = None,
        due: Tensor | None = None,
    ) -> None:
        """The step of all calls, with the gradients that the column has now. ``params``: as they were.

        ``updates`` and ``due``: as of a step op, with a row for each parameter. Those of the calls that the
        table is made from are not in it.
        """
        tally = {} if updates is None and due is None else {"updates": updates, "due": due}
        self._do(
            "_planned_step_",
            self._rows,
            self._column,
            self._groups,
            self._like,
            inv_scale=inputs.inv_scale,
            clip_coef=inputs.clip_coef,
            found_inf=inputs.found_inf,
            **inputs.log_arguments(),
            **tally,
        )
        torch.autograd.graph.increment_version(params)  # states are not differentiated through
        if updates is not None:
            torch.autograd.graph.increment_version(updates)

    def _do(self, name: str, *args: Any, **kwargs: Any) -> None:
        try:
            getattr(torch.ops.fusedamp, name).default(*args, **kwargs)
        except RuntimeError as error:
            for op in (*self.ops, name):
                if (complaint := checks.complaint(op, error)) is not None:
                    raise complaint from error
            raise

    def _kind_of_rate(self, lr: Tensor) -> int:
        if lr.numel() != 1 or lr.dtype not in (torch.float32, torch.float64) or lr.device != self.device:
            raise ValueError(
                f"[{self.ops[0]}] lr is {str(lr.dtype).removeprefix('torch.')} of shape {list(lr.shape)} on "
                f"{lr.device}; expected one float32 or float64 element on {self.device}"
            )
        return _FLOAT32 if lr.dtype == torch.float32 else _FLOAT64

    def _rows_of(self, call: StepCall, group: int, grad_kinds: Tensor) -> Tensor:
        n, has_masters, states = len(call.params), bool(call.masters), call.states_in_order()
        kept = [*call.steps, *call.masters, *states, *call.scales]
        fields, state_fields, params = (
            read([*call.params, *kept], stored=True),
            read(kept, stored=True),
            read(list(call.params)),
        )
        is_whole = not call.places and call.squares is None
        if fields is None or state_fields is None or params is None or not is_whole:
            raise ValueError(f"[{call.op}] not all tensors are plain; expected contiguous ones on one device")
        self.parts.append(_Part(params, state_fields, n if call.params[0].device.type == "cpu" else 0))
        addresses, numels, kinds = rows(fields).view(3, -1, n)
        nothing = torch.zeros_like(addresses[0])
        first = 2 + has_masters
        middle = first + len(states) // n
        state_columns, scale_columns = [nothing] * 3, [nothing] * 3
        state_columns[: middle - first] = addresses[first:middle]
        scale_columns[: len(addresses) - middle] = addresses[middle:]
        master_kind = kinds[2] if has_masters else torch.full_like(nothing, _FLOAT32)
        # Without states the dtype says nothing.
        state_kind = kinds[first] if states else (kinds[0] == _FLOAT64) + torch.full_like(nothing, _FLOAT32)
        state_kind = torch.where(state_kind == _UINT8, _INT8, state_kind)
        kind = group | grad_kinds << 32 | kinds[0] << 40 | master_kind << 48 | state_kind << 56
        flags = int(call.scalars["maximize"]) | int(call.scalars["stochastic_rounding"]) << 8
        seeds = (
            torch.tensor(call.seeds, device="cpu") if call.seeds else nothing
        )  # whatever the default device is
        masters = addresses[2] if has_masters else nothing
        columns = [
            addresses[0],
            masters,
            *state_columns,
            *scale_columns,
            addresses[1],
            nothing,  # no squares: norms are of whole tensors
            numels[0],
            seeds,
            *[nothing] * 3,  # the place of a whole tensor
            kind,
        ]
        return torch.stack([*columns, torch.full_like(nothing, flags)], 1)


def rule_of(call: StepCall) -> int:
    """The number of the update rule of a call; calls of the same rule belong together."""
    return int(torch.ops.fusedamp._rule_of(call.op, len(call.states_in_order()) // len(call.params)))
