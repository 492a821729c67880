"""SGD with momentum."""

from __future__ import annotations

from operator import itemgetter
from typing import Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from .core.batch import Group
from .core.optimizer import FusedOptimizer
from .core.options import FINITE, NOT_NEGATIVE
from .state.formats import Storage, options
from .state.spec import StateSpec


class SGD(FusedOptimizer):
    """``torch.optim.SGD`` with FP32 master weights, fused with unscaling, clipping and the overflow skip.

    Args:
        params, lr, momentum, dampening, weight_decay, nesterov, maximize: as in ``torch.optim.SGD``.
            ``lr`` may be a tensor of one element, which is read on the device at each step.
        foreach, fused: accepted and saved, without effect: the step is always fused, and a CUDA graph can
            capture it after a first step has created the state.
        differentiable: must be False.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step`` (gradients accumulated in the buffer), with momentum ``momentum_buffer``, and ``master``.
    Sparse gradients are densified.
    Cost: 20 B/param read and written in BF16 with masters and momentum; no host sync.
    Source: Polyak 1964; Nesterov's form as in Sutskever et al. 2013.
    """

    op, hyper = "sgd_", options_of("sgd_")
    bounds = {"momentum": NOT_NEGATIVE, "dampening": FINITE}
    # A buffer is initialized with its first gradient. torch stores no count: a loaded buffer counts as 1.
    states = (StateSpec("momentum_buffer", when=itemgetter("momentum"), count=1.0, restarts=True),)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0,
        dampening: float = 0,
        weight_decay: float | Tensor = 0,
        nesterov: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)

    def _check_group(self, where: str, group: Group) -> None:
        super()._check_group(where, group)
        if group["nesterov"] and (group["momentum"] <= 0 or group["dampening"] != 0):
            raise ValueError(
                f"{where} nesterov is True with momentum {group['momentum']} and dampening "
                f"{group['dampening']}; expected momentum > 0 and dampening 0. Pass these, or nesterov=False."
            )

    def _densified(self, grad: Tensor) -> Tensor:
        return grad.to_dense()
