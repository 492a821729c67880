"""DTensor seen from the ops: custom ops get no DTensor dispatch, so the shards are unwrapped and reduced
here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# One dimension of a DeviceMesh along which ranks hold different parts of a tensor: (mesh, dimension).
MeshDim = tuple[Any, int]
PLAIN = frozenset({Tensor, torch.nn.Parameter})


def is_dtensor(tensor: Tensor) -> bool:
    if type(tensor) in PLAIN:
        return False
    # Nobody can hold a DTensor before its module is imported, and importing it takes a second.
    module = sys.modules.get("torch.distributed.tensor")
    return isinstance(tensor, getattr(module, "DTensor", ()))


def is_flattened(tensor: Tensor) -> bool:
    """Whether FSDP1 has made ``tensor`` a part of its flat parameters, which it shards by elements."""
    return getattr(tensor, "_fsdp_flattened", False)


def is_distributed() -> bool:
    dist = torch.distributed
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def refuse_flattened(op: str, params: Sequence[Tensor]) -> None:
    """Raise where ranks hold shards of FSDP1, of which nothing tells how they belong together."""
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
    """Raise where ``param`` is one of FSDP1's: ``optimizer`` needs norms or matrices of whole tensors."""
    if is_flattened(param):
        raise ValueError(
            f"of shape {list(param.shape)} belongs to a flat parameter of FSDP1; expected the whole tensor "
            f"on each rank, as {optimizer} needs its norm or its shape. Use an elementwise optimizer such as "
            "AdamW, or replicate the model (DistributedDataParallel)."
        )


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds, sharing its memory; a plain tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    shard: Any = tensor._local_tensor  # type: ignore[attr-defined]
    # A collective may still be in flight (AsyncCollectiveTensor): raw memory must not be read before its end.
    whole: Tensor = shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard
    return whole


def sharded_dims(tensor: Tensor) -> tuple[MeshDim, ...]:
    """The mesh dimensions over which ``tensor`` is not replicated; empty for a plain tensor."""
    if not is_dtensor(tensor):
        return ()
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return tuple((mesh, dim) for dim, placement in enumerate(placements) if not placement.is_replicate())


def follow_placements(param: Tensor) -> None:
    """Give ``param.grad`` the placements of ``param``: a Partial gradient holds only a summand of the true
    one.
    """
    grad = param.grad
    if grad is not None and is_dtensor(param) and is_dtensor(grad):
        mesh, placements = param.device_mesh, param.placements  # type: ignore[attr-defined]
        if grad.placements != placements:  # type: ignore[attr-defined]
            param.grad = grad.redistribute(mesh, placements)  # type: ignore[attr-defined]


def all_reduce_(tensor: Tensor, dims: Iterable[MeshDim], op: str) -> None:
    """Reduce ``tensor`` in place ("max" or "sum") over each mesh dimension in turn; all ranks must join."""
    for mesh, dim in dims:
        if mesh.get_coordinate() is not None:  # else this rank is not part of the mesh
            ops = torch.distributed.ReduceOp
            torch.distributed.all_reduce(
                tensor, op=ops.MAX if op == "max" else ops.SUM, group=mesh.get_group(dim)
            )
