"""Adam and AdamW."""

from __future__ import annotations

from operator import itemgetter
from typing import Any, Unpack

from torch import Tensor
from torch.optim.optimizer import ParamsT

from ..ops import options_of
from .core.batch import Group
from .core.optimizer import FusedOptimizer
from .core.options import BETAS, NOT_NEGATIVE
from .state.formats import Storage, options
from .state.spec import StateSpec


class Adam(FusedOptimizer):
    """``torch.optim.Adam`` with FP32 master weights, fused with unscaling, clipping and the overflow skip.

    Args:
        params, lr, betas, eps, weight_decay, amsgrad, maximize, decoupled_weight_decay: as in torch.
            ``lr`` may be a tensor of one element, which is read on the device at each step.
        foreach, fused, capturable: accepted and saved, without effect: the step is always fused, and a CUDA
            graph can capture it after a first step has created the state.
        differentiable: must be False.
        master_weights: "auto" and "fp32" keep an FP32 ``master`` in the state of each FP16 or BF16 parameter.
            After a step the parameter is the master rounded to nearest even, bit for bit. If the parameter is
            modified, its master is updated to match. "split" stores the same FP32 master in half the memory:
            ``master`` is an int16 remainder that is added to the 16-bit weight. BF16: exact; the weight is
            the master rounded with ties away from zero. FP16: exact from 2^-16, with a spacing of 2^-39
            below; infinite from 65520, like the weight. A modified weight keeps its remainder, at most half a
            unit in the last place. "none" updates the 16-bit weights themselves in FP32 arithmetic; updates
            below half a unit in the last place are lost unless ``stochastic_rounding`` is True. True stands
            for "fp32", False for "none".
        state_dtype: torch.float32 or "float32" (FP64 for FP64 parameters); torch.bfloat16 or "bfloat16"; or
            "int8": 8-bit quantized values with one FP32 scale per block of 128 elements, on a nonuniform grid
            that keeps small values precise beside large ones. The latter two use stochastic rounding, which
            is unbiased. An 8-bit state is a tensor that dequantizes itself in arithmetic: see
            :class:`fusedamp.optim.state.encoded.Quantized`.
        rounding_seed: seed of all random numbers, 0 to 2**31 - 1. None: a number unique to this optimizer in
            the process, equal on all ranks that construct the same optimizers. Random numbers depend only on
            the seed, the parameter's position in the optimizer, its step count and the element, not on
            torch's generators. Checkpoints store the seed, so runs are reproducible and resume bit for bit. A
            copy draws the same numbers as its original; set another seed to change that.
        stochastic_rounding: round 16-bit weights stochastically; only with ``master_weights="none"``.
    State: ``step``, ``exp_avg``, ``exp_avg_sq``, with amsgrad ``max_exp_avg_sq``, and ``master``; 8-bit
        states add ``exp_avg_scale``, ``exp_avg_numel``, ``exp_avg_order`` ..., for checkpoints.
    Cost: 28 B/param read and written in BF16 with masters; no host sync.
    Source: Kingma and Ba 2015, arXiv:1412.6980, Alg. 1; amsgrad: Reddi et al. 2018, arXiv:1904.09237.
    """

    hyper = options_of("adamw_")  # and of adam_
    bounds = {"eps": NOT_NEGATIVE, "betas": BETAS}
    states = (
        StateSpec("exp_avg", required=True),
        StateSpec("exp_avg_sq", nonnegative=True, required=True),
        StateSpec("max_exp_avg_sq", nonnegative=True, when=itemgetter("amsgrad")),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0,
        amsgrad: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        decoupled_weight_decay: bool = False,
        **storage: Unpack[Storage],
    ) -> None:
        # In the key order of torch's groups.
        given: dict[str, Any] = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad)
        given |= dict(maximize=maximize, foreach=foreach, capturable=capturable)
        given |= dict(differentiable=differentiable, fused=fused)
        super().__init__(params, {**given, "decoupled_weight_decay": decoupled_weight_decay}, storage)

    def _op_name(self, group: Group) -> str:
        return "adamw_" if group["decoupled_weight_decay"] else "adam_"


class AdamW(Adam):
    """``torch.optim.AdamW``: :class:`Adam` whose weight decay shrinks the weights directly.

    Source: Loshchilov and Hutter 2019, arXiv:1711.05101, Alg. 2.
    """

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, **options(locals()), decoupled_weight_decay=True, **storage)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # checkpoints of Adam, and of torch before the key existed
            group["decoupled_weight_decay"] = True
