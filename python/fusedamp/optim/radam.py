"""RAdam."""

from __future__ import annotations

from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from .core.optimizer import FusedOptimizer
from .core.options import BETAS, NOT_NEGATIVE
from .state.formats import Storage
from .state.spec import StateSpec


class RAdam(FusedOptimizer):
    """``torch.optim.RAdam`` with FP32 master weights, fused with unscaling, clipping and the overflow skip.

    Args:
        params, lr, betas, eps, weight_decay, decoupled_weight_decay, maximize: as in torch. ``lr`` may be a
            tensor of one element, which is read on the device at each step.
        foreach, capturable: accepted and saved, without effect: the step is always fused, and a CUDA graph
            can capture it after a first step has created the state.
        differentiable: must be False.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``exp_avg``, ``exp_avg_sq`` and ``master``.
    Cost: 28 B/param read and written in BF16 with masters; no host sync.
    Source: Liu et al. 2020, arXiv:1908.03265, Alg. 2.
    """

    op, hyper = "radam_", options_of("radam_")
    bounds = {"eps": NOT_NEGATIVE, "betas": BETAS}
    states = (
        StateSpec("exp_avg", required=True),
        StateSpec("exp_avg_sq", nonnegative=True, required=True),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
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
        given |= dict(maximize=maximize, foreach=foreach, capturable=capturable)
        given |= dict(decoupled_weight_decay=decoupled_weight_decay, differentiable=differentiable)
        super().__init__(params, given, storage)
