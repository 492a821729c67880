"""Muon, with AdamW for non-matrix parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import ops
from ..ops.checks import refuse
from ..tensors.shards import need_whole
from .core.batch import Batch, Group
from .core.composed import ComposedOptimizer, Values
from .core.optimizer import FusedOptimizer
from .core.options import BETAS, FRACTION, NOT_NEGATIVE, Bounds
from .state.formats import Storage, options
from .state.spec import StateSpec

ADJUST_LR_FNS = (None, "original", "match_rms_adamw", "spectral_unclamped")
NS_DTYPES = ("bfloat16", "float16", "float32", "float64")
MAX_NS_STEPS = 99


def _has_matrices(group: Group) -> bool:
    return group["use_muon"] is not False


def _has_others(group: Group) -> bool:
    return group["use_muon"] is not True


def _is_matrix(param: Tensor, group: Group) -> bool:
    return param.dim() == 2 if group["use_muon"] is None else group["use_muon"]


def _is_other(param: Tensor, group: Group) -> bool:
    return not _is_matrix(param, group)


class Muon(ComposedOptimizer):
    """``torch.optim.Muon`` with FP32 master weights; AdamW updates non-matrix parameters in the same call.

    Newton-Schulz iterations in 16 bits with FP32 accumulation orthogonalize a matrix's momentum
    approximately. Momentum, decay and update are FP32 (FP64 for FP64 parameters).

    Args:
        params, lr, weight_decay, momentum, nesterov, ns_coefficients, eps, ns_steps, adjust_lr_fn: as in
            torch. ``lr`` may be a tensor of one element, which is read on the device at each step.
            With "match_rms_adamw" both algorithms can use the same learning rate.
        maximize: ascend instead of descend.
        use_muon: group option: True (Muon for all, matrices only), False (AdamW for all), or None (Muon for
            two-dimensional parameters, AdamW for others). Embeddings and output layers are two-dimensional
            too: put them into a separate group with ``use_muon=False`` and its own ``lr``.
        adamw_betas, adamw_eps: AdamW's; its ``lr`` and ``weight_decay`` are the group's.
        ns_dtype: dtype of the Newton-Schulz iterations, or its name: bfloat16 (as in torch), float16,
            float32, float64.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step`` and ``momentum_buffer``, or AdamW's ``exp_avg`` and ``exp_avg_sq``; and ``master``.
    Cost: 3 matrix products per iteration, by torch's matmul; AdamW's part is one fused op. No host sync.
        DTensor matrices raise: iterations need the whole matrix.
    Source: Jordan et al. 2024, https://kellerjordan.github.io/posts/muon; "match_rms_adamw": Liu et al. 2025,
        arXiv:2502.16982; AdamW: Loshchilov and Hutter 2019, arXiv:1711.05101.
    """

    op, hyper = "adamw_", ops.options_of("adamw_")
    bounds = {
        "momentum": FRACTION,
        "eps": NOT_NEGATIVE,
        "adamw_eps": NOT_NEGATIVE,
        "ns_coefficients": Bounds(low=-math.inf, length=3),
        "adamw_betas": BETAS,
    }
    states = (
        StateSpec("momentum_buffer", required=True, when=_has_matrices, of=_is_matrix, count=1.0),
        StateSpec("exp_avg", required=True, when=_has_others, of=_is_other, count=0.0),
        StateSpec("exp_avg_sq", required=True, when=_has_others, of=_is_other, count=0.0),
    )

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = (3.4445, -4.775, 2.0315),
        eps: float = 1e-7,
        ns_steps: int = 5,
        adjust_lr_fn: str | None = None,
        *,
        maximize: bool = False,
        use_muon: bool | None = None,
        adamw_betas: tuple[float, float] = (0.9, 0.95),
        adamw_eps: float = 1e-8,
        ns_dtype: torch.dtype | str = torch.bfloat16,
        **storage: Unpack[Storage],
    ) -> None:
        super().__init__(params, options(locals()), storage)

    def _check_group(self, where: str, group: Group) -> None:
        super()._check_group(where, group)
        if not isinstance(group["ns_steps"], int) or not 0 <= group["ns_steps"] <= MAX_NS_STEPS:
            refuse(where, "ns_steps", group["ns_steps"], f"a whole number from 0 to {MAX_NS_STEPS}")
        for name, known in (
            ("adjust_lr_fn", ADJUST_LR_FNS),
            ("ns_dtype", NS_DTYPES),
            ("use_muon", (None, True, False)),
        ):
            if group[name] not in known:
                refuse(where, name, group[name], f"one of {known}")

    def _check_param(self, param: Tensor, group: Group) -> None:
        if _has_matrices(group):
            need_whole(param, type(self).__name__)
        if not _is_matrix(param, group):
            FusedOptimizer._check_param(self, param, group)
            return
        if param.dim() != 2:
            raise ValueError(
                f"has shape {list(param.shape)} in a group with use_muon=True; expected two dimensions. "
                "Leave use_muon out, or put the parameter into a group with use_muon=False."
            )
        super()._check_param(param, group)

    def _op(self, group: Group) -> tuple[str, dict[str, Any]]:
        return super()._op(group | {"betas": group["adamw_betas"], "eps": group["adamw_eps"]})

    def _check_calls(self, batches: list[Batch]) -> None:
        parts = [part for batch in batches for part in _parts(batch)]
        ops.check_steps([part.call() for part, is_matrix in parts if not is_matrix])
        super()._check_calls([part for part, _ in parts])

    def _launch(self, batches: list[Batch]) -> None:
        for part, is_matrix in [part for batch in batches for part in _parts(batch)]:
            super()._launch([part]) if is_matrix else part.launch()

    def _rule(
        self, group: Group, lr: float | Tensor, weight: Tensor, grad: Tensor, states: Values, step: Tensor
    ) -> tuple[Tensor, Values]:
        momentum = float(group["momentum"])
        buffer = torch.lerp(states["momentum_buffer"], grad, 1 - momentum)
        update = torch.lerp(grad, buffer, momentum) if group["nesterov"] else buffer
        direction = orthogonalized(
            update,
            group["ns_coefficients"],
            group["ns_steps"],
            group["eps"],
            getattr(torch, group["ns_dtype"]),
        )
        factors = (float(group["weight_decay"]), _lr_ratio(group["adjust_lr_fn"], *weight.shape))
        decay, rate = (
            (lr * factor).to(weight.dtype) if isinstance(lr, Tensor) else lr * factor for factor in factors
        )
        return weight - decay * weight - rate * direction, {"momentum_buffer": buffer}


def _parts(batch: Batch) -> Iterator[tuple[Batch, bool]]:
    """Split ``batch`` into AdamW's parameters and matrices; yields each with a flag that is True for
    matrices."""
    pairs = list(zip(batch.slots, batch.grads, strict=True))
    for wanted in (False, True):
        some = [pair for pair in pairs if _is_matrix(pair[0].param, batch.group) == wanted]
        if some:
            slots, grads = map(list, zip(*some, strict=True))
            yield replace(batch, state_names=slots[0].names, slots=slots, grads=grads), wanted


def _lr_ratio(adjust_lr_fn: str | None, rows: int, columns: int) -> float:
    if adjust_lr_fn == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    ratio = rows / max(columns, 1)
    return math.sqrt(ratio if adjust_lr_fn == "spectral_unclamped" else max(1.0, ratio))


def orthogonalized(
    matrix: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float, dtype: torch.dtype
) -> Tensor:
    """Bring the singular values of ``matrix`` near 1 by applying an odd polynomial ``steps`` times.

    Args:
        matrix (2-d, FP32 or FP64): not modified. It is divided by max(its Frobenius norm, ``eps``) before
            rounding to ``dtype``, so that FP16 neither overflows nor underflows.
        coefficients: of x, x^3 and x^5.
        dtype: of the inputs and outputs of products; sums are FP32 (FP64 for FP64).
    Returns: a matrix like ``matrix``.
    """
    a, b, c = coefficients
    wide = matrix.size(0) <= matrix.size(1)
    length = torch.linalg.vector_norm(matrix, dtype=torch.float64)  # FP32 squares overflow at 3.4e38
    x = (matrix / length.clamp(min=eps)).to(dtype)
    if not wide:
        x = x.mT  # the smaller product of x with itself
    with torch.autocast(x.device.type, enabled=False), _sums_in_fp32(x.device):
        for _ in range(steps):
            square = x @ x.mT
            x = torch.addmm(x, torch.addmm(square, square, square, beta=b, alpha=c), x, beta=a)
    result: Tensor = x if wide else x.mT
    return result.to(matrix.dtype)


@contextmanager
def _sums_in_fp32(device: torch.device) -> Iterator[None]:
    """Make CUDA accumulate 16-bit products in FP32; by default torch lets cuBLAS round partial sums."""
    if device.type != "cuda":  # CPU kernels sum in FP32
        yield
        return
    matmul: Any = torch.backends.cuda.matmul
    names = [f"allow_{kind}_reduced_precision_reduction" for kind in ("bf16", "fp16")]
    saved = [(getattr(matmul, name), getattr(matmul, f"{name}_split_k", True)) for name in names]
    accumulation = matmul.allow_fp16_accumulation
    try:
        for name, (_, split_k) in zip(names, saved, strict=True):
            setattr(matmul, name, False if split_k else (False, split_k))
        matmul.allow_fp16_accumulation = False
        yield
    finally:
        for name, (reduced, split_k) in zip(names, saved, strict=True):
            setattr(matmul, name, reduced if split_k else (reduced, split_k))
        matmul.allow_fp16_accumulation = accumulation
