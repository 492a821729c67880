"""Muon, with AdamW for non-matrix parameters."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Unpack

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from .. import ops
from ..ops.checks import refuse
from ..tensors.blocks import block_of, split_over
from ..tensors.exchange import Exchange, overlapped
from ..tensors.shards import MeshDim, local, need_whole
from .core.batch import Batch, Group
from .core.composed import ComposedOptimizer, Update
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
        per_shard: name of a mesh dimension, such as "tp": the parts of a DTensor along it are orthogonalized
            one by one, each as a matrix of its own. Nothing is sent over it, and results differ.
        master_weights: as in :class:`fusedamp.optim.AdamW`.
    State: ``step`` and ``momentum_buffer``, or AdamW's ``exp_avg`` and ``exp_avg_sq``; and ``master``.
    Cost: 3 matrix products per iteration, by torch's matmul; AdamW's part is one fused op. No host sync.
        Sharded DTensors get the bits of whole matrices. In each round every rank gathers one matrix,
        multiplies, and sends the result back; the next round's momentum is sent meanwhile. Along a mesh
        dimension of n ranks, each sends (n - 1) / n times 6 bytes per element of its shards (4 of FP32
        momentum, 2 of BF16 result), and needs memory for about three FP32 matrices. Each replica computes
        all products.
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
        per_shard: str | None = None,
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
        if not isinstance(group["per_shard"], str | None):
            refuse(where, "per_shard", group["per_shard"], "the name of a mesh dimension, or None")

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
        if dims := _gathered_over(param, group):
            block_of(param, dims)

    def _is_joint(self, param: Tensor, group: Group) -> bool:
        return _is_matrix(param, group) and super()._is_joint(param, group)

    def _op(self, group: Group) -> tuple[str, dict[str, Any]]:
        return super()._op(group | {"betas": group["adamw_betas"], "eps": group["adamw_eps"]})

    def _check_calls(self, batches: list[Batch]) -> None:
        self._check_names()
        parts = [part for batch in batches for part in _parts(batch)]
        ops.check_steps([part.call() for part, is_matrix in parts if not is_matrix])
        super()._check_calls([part for part, _ in parts])

    def _check_names(self) -> None:
        """Raise if ``per_shard`` of a group is not a dimension of any mesh that splits its parameters."""
        for g, group in enumerate(self.param_groups):
            if group["per_shard"] is not None:
                meshes = {mesh for param in group["params"] for mesh, _ in split_over(param)}
                names = sorted({name for mesh in meshes for name in mesh.mesh_dim_names or ()})
                if meshes and group["per_shard"] not in names:
                    raise ValueError(
                        f"{self._where(g)} per_shard is {group['per_shard']!r}; expected a dimension of the "
                        f"parameters' meshes, which have {names}. Name it there (mesh_dim_names), or leave "
                        "per_shard out."
                    )

    def _launch(self, batches: list[Batch]) -> None:
        parts = [part for batch in batches for part in _parts(batch)]
        for part, is_matrix in parts:
            if not is_matrix:
                part.launch(self)
        super()._launch([part for part, is_matrix in parts if is_matrix])

    def _run(self, updates: list[Update]) -> None:
        together: dict[Any, list[Update]] = {}
        for update in updates:
            if dims := _gathered_over(update.param, update.group):
                kind = dims, local(update.param).device, update.param.dtype, update.group["ns_dtype"]
                together.setdefault(kind, []).append(update)
            else:
                update.start()
                buffer, momentum = self._momentum(update)
                self._finish(update, buffer, self._orthogonal(update.group, momentum), momentum.shape)
        for (dims, *_), some in together.items():
            overlapped(self._round(dims, few) for few in _rounds(dims, some))

    def _round(self, dims: tuple[MeshDim, ...], updates: list[Update]) -> Iterator[None]:
        """Make ``updates``, at most one per rank along ``dims``; yields after it began to send."""
        blocks = [block_of(update.param, dims) for update in updates]
        for update in updates:
            update.start()
        buffers, momenta = zip(*map(self._momentum, updates), strict=True)
        exchange = Exchange(dims, blocks, momenta[0].device)
        exchange.gather(momenta)
        yield
        dtype = getattr(torch, updates[0].group["ns_dtype"])
        directions = {
            i: self._orthogonal(updates[i].group, whole) for i, whole in exchange.matrices().items()
        }
        exchange.scatter(directions, dtype)
        yield
        for update, block, buffer, direction in zip(updates, blocks, buffers, exchange.shards(), strict=True):
            self._finish(update, buffer, direction, block.shape)

    def _momentum(self, update: Update) -> tuple[Tensor, Tensor]:
        """Return the new momentum, and what is orthogonalized."""
        grad, momentum = update.grad, float(update.group["momentum"])
        buffer = torch.lerp(update.states["momentum_buffer"], grad, 1 - momentum)
        return buffer, torch.lerp(grad, buffer, momentum) if update.group["nesterov"] else buffer

    def _orthogonal(self, group: Group, matrix: Tensor) -> Tensor:
        coefficients, dtype = group["ns_coefficients"], getattr(torch, group["ns_dtype"])
        return orthogonalized(matrix, coefficients, group["ns_steps"], group["eps"], dtype)

    def _finish(self, update: Update, buffer: Tensor, direction: Tensor, shape: Sequence[int]) -> None:
        group, lr, weight = update.group, update.lr, update.weight
        factors = (float(group["weight_decay"]), _lr_ratio(group["adjust_lr_fn"], *shape))
        decay, rate = (
            (lr * factor).to(weight.dtype) if isinstance(lr, Tensor) else lr * factor for factor in factors
        )
        new = weight - decay * weight - rate * direction.to(weight.dtype)
        update.finish(new, {"momentum_buffer": buffer})


def _gathered_over(param: Tensor, group: Group) -> tuple[MeshDim, ...]:
    """Return the mesh dimensions over which ``param`` is gathered to be orthogonalized."""
    return tuple(
        (mesh, dim)
        for mesh, dim in split_over(param)
        if group["per_shard"] is None or group["per_shard"] not in (mesh.mesh_dim_names or ())[dim : dim + 1]
    )


def _rounds(dims: tuple[MeshDim, ...], updates: list[Update]) -> Iterator[list[Update]]:
    """Divide ``updates`` into rounds of one per rank, of similar cost: ranks wait for each other."""
    world = math.prod(mesh.size(dim) for mesh, dim in dims)
    ordered = sorted(updates, key=lambda update: _cost(update.param), reverse=True)
    for i in range(0, len(ordered), world):
        yield ordered[i : i + world]


def _cost(matrix: Tensor) -> int:
    """Return a number to which the FLOPs of the iterations are proportional."""
    return min(matrix.shape) ** 2 * max(matrix.shape)


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
    Returns: a matrix of the shape of ``matrix``, in ``dtype``.
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
    return result


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
