"""The tensors of one step op as a table of addresses."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _C
from ..tensors.addresses import WORD, Fields, can_read, read, rows
from . import checks


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
        self._grad_kinds = grads[len(params) * WORD :]
        self._rows = self._packed_rows(rows(fields), rows(grads), bool(masters), seeds)

    def grads(self) -> Fields | None:
        """The fields of the parameters' gradients; None where these or the parameters differ from the first
        ones in more than values, and the addresses of gradients.
        """
        grads = _C.read_grads(self.params, self.param_fields) if can_read() else None
        return grads if grads is not None and grads[len(self.params) * WORD :] == self._grad_kinds else None

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
            if (complaint := checks.complaint(self.op, error)) is None:
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
