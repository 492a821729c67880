"""RMSprop."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from .core.batch import Group
from .core.optimizer import FusedOptimizer
from .core.options import NOT_NEGATIVE
from .state.formats import Storage
from .state.spec import StateSpec


class RMSprop(FusedOptimizer):
    """``torch.optim.RMSprop`` with FP32 master weights, fused with unscaling, clipping and the overflow skip.

    Args:
        params, lr, alpha, eps, weight_decay, momentum, centered, maximize: as in torch. ``lr`` may be a
            tensor of one element, which is read on the device at each step. A ``centered`` variance that is
            negative due to rounding counts as 0 (torch's step is NaN).
        capturable, foreach: accepted and saved, without effect: the step is always fused, and a CUDA graph
            can capture it after a first step has created the state.
        differentiable: must be False.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``square_avg``, centered ``grad_avg``, with momentum ``momentum_buffer``, and ``master``.
    Cost: 20 B/param read and written in BF16 with masters, 8 more for each further state; no host sync.
    Source: Tieleman and Hinton 2012, Lecture 6.5; centered: Graves 2013, arXiv:1308.0850.
    """

    hyper = options_of("rmsprop_")  # and of rmsprop_centered_
    bounds = dict.fromkeys(("alpha", "eps", "momentum"), NOT_NEGATIVE)
    states = (
        StateSpec("square_avg", nonnegative=True, required=True),
        StateSpec("grad_avg", when=itemgetter("centered")),
        StateSpec("momentum_buffer", when=itemgetter("momentum")),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        alpha: float = 0.99,
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum: float = 0,
        centered: bool = False,
        capturable: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        differentiable: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        # In the key order of torch's groups.
        given: dict[str, Any] = dict(lr=lr, momentum=momentum, alpha=alpha, eps=eps, centered=centered)
        given |= dict(weight_decay=weight_decay, capturable=capturable, foreach=foreach)
        super().__init__(params, given | dict(maximize=maximize, differentiable=differentiable), storage)

    def _check_group(self, where: str, group: Group) -> None:
        super()._check_group(where, group)
        if group["centered"] and group["state_dtype"] != "float32":
            raise ValueError(
                f"{where} state_dtype is {group['state_dtype']!r} with centered=True; expected "
                '"float32", as the difference of two rounded states may lose the variance. Pass '
                "centered=False."
            )

    def _op_name(self, group: Group) -> str:
        return "rmsprop_centered_" if group["centered"] else "rmsprop_"
