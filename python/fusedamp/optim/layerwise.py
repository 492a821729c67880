"""Optimizers whose step uses norms of whole tensors: LAMB, LARS, NovoGrad.

Norms are computed from unscaled, clipped gradients and from the masters, and added up over the ranks that
shard a tensor. A skipped step changes nothing. CPU, CUDA and different numbers of ranks sum in different
orders, so results may differ in the last bits.
"""

from __future__ import annotations

import math
from typing import Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import measure, options_of
from ..tensors.blocks import split_over
from ..tensors.exchange import add_up_
from ..tensors.layout import scalar_like
from ..tensors.shards import local, need_whole
from .core.batch import Batch, Group
from .core.optimizer import FusedOptimizer
from .core.options import BETAS, NOT_NEGATIVE
from .state.formats import Storage, options
from .state.spec import StateSpec


class Layerwise(FusedOptimizer):
    """Base class of layerwise optimizers. A step of sharded DTensors measures its shards, adds up the sums of
    squares over ranks, and then updates the shards: one all-reduce of 16 bytes per tensor for each mesh
    dimension.
    """

    def _check_param(self, param: Tensor, group: Group) -> None:
        super()._check_param(param, group)
        need_whole(param, type(self).__name__)

    def _is_joint(self, param: Tensor, group: Group) -> bool:
        return bool(split_over(param))

    def _launch(self, batches: list[Batch]) -> None:
        squares = self._squares_over_ranks(batches)
        for batch in batches:
            if any(id(slot.param) in squares for slot in batch.slots):
                batch.launch(self, torch.stack([squares[id(slot.param)] for slot in batch.slots]))
            else:
                batch.launch(self)

    def _squares_over_ranks(self, batches: list[Batch]) -> dict[int, Tensor]:
        """Return the sums of squares of whole tensors by ``id(param)``, in batches with shards; collective.

        All ranks reduce the same tensors, also those that have no gradient on this rank.
        """
        params = [param for group in self.param_groups for param in group["params"]]
        over = {id(param): dims for param in params if (dims := split_over(param))}
        squares = {
            id(param): torch.zeros(2, dtype=torch.float64, device=local(param).device)
            for param in params
            if id(param) in over
        }
        for batch in batches:
            if any(id(slot.param) in over for slot in batch.slots):
                rows = measure(batch.call()).unbind()
                squares |= {id(slot.param): row for slot, row in zip(batch.slots, rows, strict=True)}
        add_up_((squares[key], dims) for key, dims in over.items())
        return squares


class LAMB(Layerwise):
    """LAMB: Adam with the step scaled to the norm of each tensor's weights, for large batches.

    Args:
        params, lr, betas, eps, weight_decay: as in the paper; ``lr`` may be a tensor of one element, which is
            read on the device at each step. Each tensor moves by ``lr * |p| / |u| * u``, where ``u`` is
            Adam's update plus ``weight_decay * p``; by ``lr * u`` if one of the norms is 0.
        bias_correction: correct Adam's moments, as in the paper.
        trust_clip: an upper bound of ``|p| / |u|``.
        adapt: False takes ``|p| / |u|`` as 1, which is usual for groups of biases and normalization weights.
        maximize: ascend instead of descend.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``exp_avg``, ``exp_avg_sq`` and ``master``.
    Gradient clipping is done by the scaler (``GradScaler.clip_grad_norm_``) over all groups.
    Cost: 46 B/param read and written in BF16 with masters, in two passes; no host sync.
    Source: You et al. 2020, arXiv:1904.00962, Alg. 2.
    """

    op, hyper = "lamb_", options_of("lamb_")
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
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        *,
        bias_correction: bool = True,
        trust_clip: float = math.inf,
        adapt: bool = True,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)

    def _check_group(self, where: str, group: Group) -> None:
        super()._check_group(where, group)
        if group["trust_clip"] != math.inf:
            NOT_NEGATIVE.check(where, "trust_clip", group["trust_clip"])


class LARS(Layerwise):
    """LARS: SGD with the step scaled to the norm of each tensor's weights, for large batches.

    Args:
        params, lr, momentum, weight_decay, trust_coefficient, eps: each tensor's gradient, with
            ``weight_decay * p`` added, is multiplied by ``trust_coefficient * |p| / (|g| + weight_decay * |p|
            + eps)``, or by 1 if ``|p|`` or ``|g|`` is 0, and accumulated in the momentum; ``lr`` multiplies
            the momentum, as in ``torch.optim.SGD`` (in the paper it multiplies the gradient; equivalent for
            constant ``lr``). ``lr`` may be a tensor of one element, which is read at each step, on the
            device.
        nesterov: Nesterov momentum, as in ``torch.optim.SGD``.
        adapt: False multiplies by 1, which is usual for groups of biases and of normalization weights.
        maximize: ascend instead of descend.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``momentum_buffer`` and ``master``.
    Cost: 30 B/param read and written in BF16 with masters, in two passes; no host sync.
    Source: You, Gitman and Ginsburg 2017, arXiv:1708.03888, Alg. 1.
    """

    op, hyper = "lars_", options_of("lars_")
    bounds = dict.fromkeys(("momentum", "trust_coefficient", "eps"), NOT_NEGATIVE)
    states = (StateSpec("momentum_buffer", required=True, count=0.0),)

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-1,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        trust_coefficient: float = 1e-3,
        eps: float = 1e-8,
        *,
        nesterov: bool = False,
        adapt: bool = True,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)


class NovoGrad(Layerwise):
    """NovoGrad: momentum of gradients normalized by a running norm per tensor.

    Args:
        params, lr, betas, eps, weight_decay: as in the paper; ``lr`` may be a tensor of one element, which is
            read at each step, on the device.
        grad_averaging: multiply each gradient by ``1 - beta1`` before adding it to the momentum.
        maximize: ascend instead of descend.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step``, ``exp_avg``, ``exp_avg_sq`` (FP64, 0-d: one per tensor) and ``master``.
    Cost: 30 B/param read and written in BF16 with masters, in two passes; no host sync.
    Source: Ginsburg et al. 2019, arXiv:1905.11286, Alg. 1.
    """

    op, hyper = "novograd_", options_of("novograd_")
    bounds = {"eps": NOT_NEGATIVE, "betas": BETAS}
    states = (
        StateSpec("exp_avg", required=True),
        StateSpec("exp_avg_sq", like=scalar_like, required=True),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-2,
        betas: tuple[float, float] = (0.95, 0.98),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        grad_averaging: bool = False,
        maximize: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)
