"""Lion."""

from __future__ import annotations

from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from .core.optimizer import FusedOptimizer
from .core.options import BETAS
from .state.formats import Storage, options
from .state.spec import StateSpec


class Lion(FusedOptimizer):
    """Lion: every element moves by ``lr`` against the sign of its interpolated momentum.

    Args:
        params, lr, betas, weight_decay: as in the paper, which uses an ``lr`` 3 to 10 times smaller and a
            ``weight_decay`` larger by the same factor than for AdamW. The decay is decoupled: it shrinks the
            weights by ``lr * weight_decay``. ``lr`` may be a tensor of one element, which is read at each
            step, on the device.
        maximize: ascend instead of descend.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``exp_avg`` and ``master``.
    Cost: 20 B/param read and written in BF16 with masters; no host sync.
    Source: Chen et al. 2023, arXiv:2302.06675, Alg. 2.
    """

    op, hyper = "lion_", options_of("lion_")
    bounds = {"betas": BETAS}
    states = (StateSpec("exp_avg", required=True, count=0.0),)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-4,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.99),
        weight_decay: float = 0.0,
        *,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)
