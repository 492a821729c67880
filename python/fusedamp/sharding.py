"""DTensor seen from the ops: custom ops get no DTensor dispatch, so the shards are unwrapped and reduced
here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
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


def local(tensor: Tensor) -> Tensor:
    """The part of ``tensor`` that this rank holds, sharing its memory; a plain tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    shard = tensor._local_tensor  # type: ignore[attr-defined]
    # A collective may still be in flight (AsyncCollectiveTensor): raw memory must not be read before its end.
    return shard.trigger_wait() if hasattr(shard, "trigger_wait") else shard


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
