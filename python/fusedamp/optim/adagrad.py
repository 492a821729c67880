"""Adagrad."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from ..tensors.layout import STATE_DTYPES, round_robin
from ..tensors.shards import local
from .core.batch import Group
from .core.optimizer import FusedOptimizer
from .core.options import NOT_NEGATIVE
from .state.formats import Storage
from .state.spec import StateSpec


class Adagrad(FusedOptimizer):
    """``torch.optim.Adagrad`` with FP32 master weights, fused with unscaling, clipping and the overflow skip.

    Args:
        params, lr, lr_decay, weight_decay, initial_accumulator_value, eps, maximize: as in torch. ``lr`` may
            be a tensor of one element, which is read on the device at each step.
        foreach, fused: accepted and saved, without effect: the step is always fused.
        differentiable: must be False.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``sum`` and ``master``, created by the constructor, as in torch.
    Sparse gradients are densified.
    Cost: 20 B/param read and written in BF16 with masters; no host sync.
    Source: Duchi, Hazan and Singer 2011, JMLR 12.
    """

    op, hyper = "adagrad_", options_of("adagrad_")
    bounds = dict.fromkeys(("lr_decay", "eps", "initial_accumulator_value"), NOT_NEGATIVE)
    # The constructor's option applies to every group, as in torch.
    states = (StateSpec("sum", first="initial_accumulator_value", nonnegative=True, required=True),)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        lr_decay: float = 0,
        weight_decay: float = 0,
        initial_accumulator_value: float = 0,
        eps: float = 1e-10,
        foreach: bool | None = None,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **storage: Unpack[Storage],
    ) -> None:
        # In the key order of torch's groups.
        given: dict[str, Any] = dict(lr=lr, lr_decay=lr_decay, eps=eps, weight_decay=weight_decay)
        given |= dict(initial_accumulator_value=initial_accumulator_value, foreach=foreach)
        given |= dict(maximize=maximize, differentiable=differentiable, fused=fused)
        super().__init__(params, given, storage)
        round_robin(list(self._missing_states(_can_have_state)))

    def share_memory(self) -> None:
        """Move the states into shared memory, as torch's method does; call before starting processes."""
        for entry in self.state.values():
            for value in entry.values():
                if isinstance(value, Tensor):  # not the metadata of an 8-bit state
                    value.share_memory_()  # type: ignore[no-untyped-call]

    def _densified(self, grad: Tensor) -> Tensor:
        return grad.to_dense()


def _can_have_state(param: Tensor, group: Group) -> bool:
    """True if states can be created now; otherwise the first step creates them or raises."""
    return param.device.type in ("cpu", "cuda") and local(param).dtype in STATE_DTYPES
