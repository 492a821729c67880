"""Unwraps and reduces DTensors' shards, because custom ops get no DTensor dispatch."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A DeviceMesh dimension along which ranks hold different parts of a tensor: (mesh, dimension).
MeshDim = tuple[Any, int]
PLAIN = frozenset({Tensor, torch.nn.Parameter})


class Layout(NamedTuple):
    """Which ranks hold a tensor, and along which mesh dimensions they hold different parts."""

    mesh: Any  # None: a plain tensor, of which only this rank is known
    sharded: tuple[MeshDim, ...]

    @property
    def ranks(self) -> frozenset[int]:
        return frozenset() if self.mesh is None else frozenset(self.mesh.mesh.flatten().tolist())


UNSHARDED = Layout(None, ())


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
                "parameters or DTensors, since each rank would see only its own overflows and norms. Pass "
                "process_group, the ranks that shard the model, to GradScaler and to its clip_grad_norm_, or "
                "shard the model with fully_shard (FSDP2)."
            )


def need_no_replicas(op: str, params: Sequence[Tensor]) -> None:
    """Raise if FSDP1 shards some of ``params`` and others are plain: of these, each rank may have a copy."""
    flat = [is_flattened(param) for param in params]
    plain = [i for i, param in enumerate(params) if not flat[i] and not is_dtensor(param)]
    if any(flat) and plain:
        raise RuntimeError(
            f"[{op}] parameter {plain[0]} of shape {list(params[plain[0]].shape)} is not sharded, and "
            f"parameter {flat.index(True)} is sharded by FSDP1; expected only shards with process_group, as "
            "copies would count once per rank. Clip them in two optimizers, or let FSDP1 shard all."
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


def placed_with(shard: Tensor, param: Tensor, shape: Sequence[int] | None = None) -> Tensor:
    """Return a DTensor with the mesh and placements of ``param`` and the shard ``shard``, on any device.

    ``shape``: unsharded; by default that of ``param``.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta

    like = param if shape is None else torch.empty(shape, device="meta")
    meta = TensorMeta(like.shape, like.stride(), shard.dtype)
    spec = DTensorSpec(param.device_mesh, param.placements, tensor_meta=meta)  # type: ignore[attr-defined]
    # from_local would move the shard to the mesh's device, and take a view of it.
    make: Any = DTensor
    made: Tensor = make(shard, spec, requires_grad=False)
    return made


def mapped(tensor: Tensor, function: Callable[[Tensor], Tensor], shape: Sequence[int]) -> Tensor:
    """Apply ``function`` to ``tensor``, or to each shard of a DTensor; ``shape``: the result's, unsharded.

    Dimensions keep their positions, so the result is sharded as ``tensor`` is.
    """
    made = function(local(tensor))
    return placed_with(made, tensor, shape) if is_dtensor(tensor) else made


def layout_of(tensor: Tensor) -> Layout:
    """Return the layout of ``tensor``: sharded wherever its mesh does not replicate it."""
    if not is_dtensor(tensor):
        return UNSHARDED
    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    return Layout(mesh, tuple((mesh, d) for d, placed in enumerate(placements) if not placed.is_replicate()))


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
            reduce_(tensor, mesh.get_group(dim), op)


def reduce_(tensor: Tensor, group: Any, op: str) -> None:
    """Reduce ``tensor`` in place ("max" or "sum") over the ranks of ``group``; collective.

    A tensor on a device that the group's backend does not reduce on (a flag on the CPU, with NCCL alone) is
    moved to one that it does, and back.
    """
    kinds = [device.type for device in getattr(group, "_device_types", ())]
    there = tensor if not kinds or tensor.device.type in kinds else tensor.to(kinds[0])
    ops = torch.distributed.ReduceOp
    torch.distributed.all_reduce(there, op=ops.MAX if op == "max" else ops.SUM, group=group)
    if there is not tensor:
        tensor.copy_(there)


def ranks_of(group: Any) -> frozenset[int]:
    """Return the global ranks of a process group; of None: none."""
    return frozenset() if group is None else frozenset(torch.distributed.get_process_group_ranks(group))
