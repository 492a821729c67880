"""NAdam."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from ..tensors.layout import scalar_like
from .core.optimizer import FusedOptimizer
from .core.options import BETAS, NOT_NEGATIVE
from .state.formats import Storage
from .state.spec import StateSpec


class NAdam(FusedOptimizer):
    """``torch.optim.NAdam`` with FP32 master weights, fused with unscaling, clipping and the overflow skip.

    Args:
        params, lr, betas, eps, weight_decay, momentum_decay, decoupled_weight_decay, maximize: as in torch.
            ``lr`` may be a tensor of one element, which is read on the device at each step.
        foreach, capturable: accepted and saved, without effect: the step is always fused, and a CUDA graph
            can capture it after a first step has created the state.
        differentiable: must be False.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, ``mu_product`` (FP64, 0-d) and ``master``.
    Cost: 28 B/param read and written in BF16 with masters; no host sync.
    Source: Dozat 2016, "Incorporating Nesterov Momentum into Adam", Alg. 2.
    """

    op, hyper = "nadam_", options_of("nadam_")
    bounds = {"eps": NOT_NEGATIVE, "momentum_decay": NOT_NEGATIVE, "betas": BETAS}
    states = (
        StateSpec("exp_avg", required=True),
        StateSpec("exp_avg_sq", nonnegative=True, required=True),
        StateSpec("mu_product", like=scalar_like, first=1.0, required=True),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 2e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        momentum_decay: float = 4e-3,
        decoupled_weight_decay: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        # In the key order of torch's groups.
        given: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
        given |= dict(momentum_decay=momentum_decay, decoupled_weight_decay=decoupled_weight_decay)
        given |= dict(maximize=maximize, foreach=foreach, capturable=capturable)
        super().__init__(params, given | dict(differentiable=differentiable), storage)
