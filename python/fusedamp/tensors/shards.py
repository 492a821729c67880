"""Unwraps and reduces DTensors' shards, because custom ops get no DTensor dispatch."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# A DeviceMesh dimension along which ranks hold different parts of a tensor: (mesh, dimension).
MeshDim = tuple[Any, int]
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in PLAIN:
        return False
    # No DTensor exists before its module is imported, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def is_flattened(tensor: Tensor) -> bool:
    """True if ``tensor`` is part of a flat parameter of FSDP1, which shards by elements."""
    return getattr(tensor, "_fsdp_flattened", False)


def is_distributed() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_flattened(op: str, params: Sequence[Tensor]) -> None:
    """Raise if ranks hold FSDP1 shards, whose relation to each other is unknown."""
    if not is_distributed():
        return
    for i, param in enumerate(params):
        if is_flattened(param):
            raise RuntimeError(
                f"[{op}] parameter {i} of shape {list(param.shape)} is sharded by FSDP1; expected plain "
                "parameters or DTensors, since each rank would see only its own overflows and norms. Shard "
                "the model with fully_shard (FSDP2), or keep FSDP1 with its own clip_grad_norm_, torch's "
                "ShardedGradScaler and an elementwise optimizer such as fusedamp.optim.AdamW."
            )


def need_whole(param: Tensor, optimizer: str) -> None:
    """Raise if ``param`` is sharded by FSDP1: ``optimizer`` needs norms or matrices of whole tensors."""
    if is_flattened(param):
        raise ValueError(
            f"of shape {list(param.shape)} belongs to a flat parameter of FSDP1; expected the whole tensor "
            f"on each rank, as {optimizer} needs its norm or its shape. Use an elementwise optimizer such as "
            "AdamW, or replicate the model (DistributedDataParallel)."
        )


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of ``tensor``, sharing its memory; a plain tensor is returned itself."""
    if not is_dtensor(tensor):
        return tensor
    shard: Any = tensor._local_tensor  # type: ignore[attr-defined]
    # A collective may still be running (AsyncCollectiveTensor): wait for it before reading raw memory.
    whole: Tensor = shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard
    return whole


def placed_with(shard: Tensor, param: Tensor) -> Tensor:
    """Return a DTensor with the mesh and placements of ``param`` and the shard ``shard``, on any device."""
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    meta = TensorMeta(param.shape, param.stride(), shard.dtype)
    spec = DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta)  # type: ignore[attr-defined]
    make: Any = DTensor  # from_local would move the shard to the mesh's device
    made: Tensor = make(shard, spec, requires_grad=False)
    return made


def sharded_dims(tensor: Tensor) -> tuple[MeshDim, ...]:
    """Return the mesh dimensions over which ``tensor`` is not replicated; empty for a plain tensor."""
    if not is_dtensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple((mesh, dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def follow_placements(param: Tensor) -> None:
    """Redistribute ``param.grad`` to the placements of ``param``: a Partial gradient is only one summand of
    the gradient.
    """
    grad = param.grad
    if grad is not None and is_dtensor(param) and is_dtensor(grad):
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        if grad.placements != placements:  # type: ignore[attr-defined]
            param.grad = grad.redistribute(mesh, placements)  # type: ignore[attr-defined]


def all_reduce_(tensor: Tensor, dims: Iterable[MeshDim], op: str) -> None:
    """Reduce ``tensor`` in place ("max" or "sum") over each mesh dimension, one after the other;
    collective."""
    for mesh, dim in dims:
        if mesh.get_coordinate() is not None:  # else this rank is not part of the mesh
            ops = torch.distributed.ReduceOp
            torch.distributed.all_reduce(
                tensor, op=ops.MAX if op == "max" else ops.SUM, group=mesh.get_group(dim)
            )
