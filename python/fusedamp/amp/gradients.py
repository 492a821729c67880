"""Gradients in the form that the ops take: local shards, real, dense, grouped by device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import TensorWeakRef

from .. import ops
from .._C import same_items
from ..ops.observers import Reader
from ..tensors.addresses import Fields, grads_of, holds_float64, read, versions
from ..tensors.layout import gradient_of, is_dense, overlaps_itself
from ..tensors.shards import (
    PLAIN,
    UNSHARDED,
    Layout,
    MeshDim,
    all_reduce_,
    follow_placements,
    layout_of,
    local,
    ranks_of,
    reduce_,
)
from .flags import PerDevice, combine, largest_of, no_overflow, on, reduced


def writing(*grads: Tensor) -> AbstractContextManager[Any]:
    """Return a context in which torch's operations may modify ``grads``, even if inference mode created
    them."""
    return torch.inference_mode() if any(grad.is_inference() for grad in grads) else torch.no_grad()


def _is_plain(grad: Tensor) -> bool:
    return grad.is_contiguous() and not grad.is_complex()


def gradients_of(params: Iterable[Tensor]) -> list[Tensor]:
    """Return the gradients of ``params`` that have one."""
    params = list(params)
    found = grads_of(params)
    if found is not None and not found[1]:
        return found[0]
    return [grad for param in params if (grad := gradient_of(param)) is not None]


@dataclass(slots=True)
class _Bucket:
    """Gradients on one device, with each parameter's position in ``params`` and its sharding."""

    tensors: list[Tensor] = field(default_factory=list)
    positions: Sequence[int] = field(default_factory=list)
    layouts: list[Layout] = field(default_factory=list)
    fields: Fields | None = None  # of the tensors, if they were read in bulk

    def has_float64(self) -> bool:
        if self.fields is not None:
            return holds_float64(self.fields)
        return any(tensor.dtype is torch.float64 for tensor in self.tensors)


def _squares(stat: ops.GradStats, bucket: _Bucket, inv_scale: Tensor | None, norm_type: float) -> Tensor:
    """Return the sums of squares of each gradient; another norm has not computed them."""
    if norm_type != 2.0:
        stat = ops._grad_stats(bucket.tensors, inv_scale, 2.0, bucket.fields)
    return stat.per_tensor


class Gradients:
    """The current gradients of ``params``. The constructor changes no value, but may replace a ``.grad`` that
    is sparse and uncoalesced, expanded, or a DTensor whose placements differ from its parameter's.

    Args:
        params: parameters, with or without a gradient.
        magnitudes: take the absolute values of complex gradients (read-only), which norms other than 2 need.
    """

    def __init__(self, params: Iterable[Tensor], magnitudes: bool = False) -> None:
        self.by_device: dict[torch.device, _Bucket] = {}
        self.originals: list[Tensor] = []
        # Includes parameters without gradients: a rank without any must still join the reductions.
        self._all_layouts: dict[Layout, torch.device] = {}
        self._copies: list[tuple[Tensor, Tensor]] = []
        params = list(params)
        if not self._read_in_bulk(params):
            with torch.no_grad():
                for position, param in enumerate(params):
                    self._add(position, param, magnitudes)

    def _read_in_bulk(self, params: list[Tensor]) -> bool:
        """Read all gradients in one call; False unless each is a plain contiguous tensor on one device."""
        if (found := grads_of(params)) is None:
            return False
        grads, missing = found
        if missing and any(hasattr(param, "main_grad") for param in params):
            return False
        positions = [i for i, grad in enumerate(grads) if grad is not None] if missing else range(len(grads))
        present = [grads[i] for i in positions] if missing else grads
        if (fields := read(present)) is None:
            return False
        self.originals, self._all_layouts = present, {UNSHARDED: params[0].device}
        bucket = _Bucket(present, positions, [UNSHARDED] * len(present), fields)
        self.by_device[present[0].device] = bucket
        return True

    def _add(self, position: int, param: Tensor, magnitudes: bool) -> None:
        if not isinstance(param, Tensor):
            raise AssertionError(f"expected param to be torch.Tensor, got {type(param).__name__}")
        layout = layout_of(param)
        if layout not in self._all_layouts:
            self._all_layouts[layout] = local(param).device
        grad = param.grad
        if type(grad) is Tensor and grad.layout is torch.strided and layout is UNSHARDED and _is_plain(grad):
            tensor = grad  # the common case; this loop is most of a step's host time
            self.originals.append(grad)
        else:
            if layout.sharded:
                self.by_device.setdefault(local(param).device, _Bucket())
            follow_placements(param)
            if (grad := gradient_of(param)) is None:
                return
            tensor = self._real(param, grad, magnitudes)
        device = tensor.device
        if (bucket := self.by_device.get(device)) is None:
            bucket = self.by_device[device] = _Bucket()
        bucket.tensors.append(tensor)
        bucket.positions.append(position)  # type: ignore[attr-defined]  # a list here
        bucket.layouts.append(layout)

    def _real(self, param: Tensor, grad: Tensor, magnitudes: bool) -> Tensor:
        if grad.layout is torch.sparse_coo:
            # The gradient is the sum of duplicates, and only that sum shows its own overflow.
            grad = grad.coalesce()
            if not is_dense(grad._values()):
                values = grad._values().clone(memory_format=torch.contiguous_format)
                grad = torch.sparse_coo_tensor(
                    grad._indices(), values, grad.shape, is_coalesced=True, check_invariants=False
                )
            param.grad = grad
            target = grad._values()
        elif grad.layout is torch.strided:
            if not grad.is_contiguous() and overlaps_itself(local(grad)):
                grad = param.grad = grad.clone(memory_format=torch.contiguous_format)
            target = local(grad)
        else:
            raise ValueError(
                f"[GradScaler] a gradient of shape {list(grad.shape)} has layout {grad.layout}; expected "
                f"torch.strided or torch.sparse_coo. Convert it with .to_dense() or .to_sparse_coo()."
            )
        self.originals.append(grad)
        if magnitudes and target.is_complex():
            return target.abs()
        return self._dense(target)

    def _dense(self, target: Tensor) -> Tensor:
        dense = target
        if not (target.is_contiguous() or is_dense(target)) or target.is_conj():
            dense = target.clone(memory_format=torch.contiguous_format).resolve_conj()
            self._copies.append((target, dense))
        return torch.view_as_real(dense) if dense.is_complex() else dense

    def write_back(self) -> None:
        """Copy results from dense copies back into the gradients with gaps."""
        for target, dense in self._copies:
            with writing(target):
                target.copy_(dense)

    @property
    def sharded_over(self) -> tuple[MeshDim, ...]:
        """Return all mesh dimensions that shard a parameter, in parameter order."""
        return tuple(dict.fromkeys(dim for layout in self._all_layouts for dim in layout.sharded))

    def stats(
        self,
        inv_scale: Tensor | None,
        norm_type: float = 2.0,
        reader: Reader | None = None,
        only_due: bool = False,
    ) -> dict[torch.device, ops.GradStats]:
        """Check the gradients with one op per device; devices without gradients on this rank are omitted.

        ``only_due``: only ``reader`` needs the results, and only where it is due.
        """
        found = {}
        for device, bucket in self.by_device.items():
            if not bucket.tensors:
                continue
            inverse = None if inv_scale is None else on(inv_scale, device)
            numerics = None if reader is None else reader.numerics(device, bucket.positions)
            stat = ops._grad_stats(
                bucket.tensors, inverse, norm_type, bucket.fields, numerics, True, only_due
            )
            found[device] = stat
            if reader is not None:
                reader.checked(device, partial(_squares, stat, bucket, inverse, norm_type))
        return found

    def agree_(self, found_inf: PerDevice, largest: PerDevice | None = None) -> PerDevice:
        """Combine the flags in place over all devices, and over all ranks that share a sharded tensor with
        this one. If one shard overflows, no rank may step. The same for ``largest``, if it is given.
        """
        dims = self.sharded_over
        for device in self.by_device:
            if device not in found_inf:
                found_inf[device] = no_overflow(device)
        if dims:
            home = next(device for layout, device in self._all_layouts.items() if layout.sharded)
            flag = combine(found_inf.values(), home)
            top = None if largest is None else largest_of(largest.values(), home)
            flag, top = reduced(flag, top, lambda both: all_reduce_(both, dims, "max"))
            if largest is not None and top is not None:
                largest.clear()
                largest[home] = top
            for device, found in found_inf.items():
                found.copy_(on(flag, device))
        return found_inf

    def norm(
        self,
        stats: dict[torch.device, ops.GradStats],
        norm_type: float,
        device: torch.device,
        process_group: Any = None,
        clip_coef: Tensor | None = None,
    ) -> Tensor:
        """Compute the norm over all gradients of all ranks from a gradient check: 0-d, FP64, on ``device``.

        ``process_group``: ranks that together hold the model; None: those of the parameters' meshes.
        ``clip_coef``: of earlier clippings of these gradients; other ranks may have applied theirs already.
        """
        op = "max" if norm_type == math.inf else "sum"
        reduce: Callable[[Tensor], Tensor] = torch.amax if op == "max" else torch.sum
        members = ranks_of(process_group)
        totals, shares = [], []  # over all ranks, and over what is to be added up over process_group
        for layout, home in self._all_layouts.items():
            if len(self._all_layouts) == 1:
                parts = [on(s.total, home) for s in stats.values()]
            else:
                parts = [
                    on(value, home)
                    for where, s in stats.items()
                    for value, of in zip(s.per_tensor.unbind(), self.by_device[where].layouts, strict=True)
                    if of == layout
                ]
            if not parts:
                total = torch.zeros((), dtype=torch.float64, device=home)
            elif len(parts) == 1 and layout is UNSHARDED:  # it is not modified, so no copy is needed
                total = parts[0]
            else:
                total = reduce(torch.stack(parts))
            if op == "max" and layout.sharded:  # NaN handling of MAX depends on the backend
                total = total.nan_to_num(nan=math.inf, posinf=math.inf)
            all_reduce_(total, layout.sharded, op)
            total = on(total, device)
            if clip_coef is not None and norm_type != 0:
                total = total * (clip_coef if op == "max" else clip_coef.pow(norm_type))
            if process_group is None:
                totals.append(total)
            else:  # all ranks of its mesh now have the same total, which counts once
                shares.append(total if op == "max" else total / max(len(members & layout.ranks), 1))
        if process_group is not None:
            shared = reduce(torch.stack([torch.zeros((), dtype=torch.float64, device=device), *shares]))
            if op == "max":
                shared = shared.nan_to_num(nan=math.inf, posinf=math.inf)
            reduce_(shared, process_group, op)
            totals.append(shared)
        if not totals:
            return torch.zeros((), dtype=torch.float64, device=device)
        total = totals[0] if len(totals) == 1 else reduce(torch.stack(totals))
        return total.clone() if norm_type in (0.0, math.inf) else total.pow(1.0 / norm_type)

    def need_known_ranks(self, op: str) -> None:
        """Raise if the meshes of two DTensors have different ranks: those may hold replicas, or others."""
        ranks = dict.fromkeys(layout.ranks for layout in self._all_layouts if layout.mesh is not None)
        if len(ranks) > 1:
            first, second, *_ = (sorted(r) for r in ranks)
            raise RuntimeError(
                f"[{op}] the parameters' meshes have the ranks {first} and {second}; expected the same ranks "
                "for all, as others may hold replicas or different parameters (experts). Pass process_group: "
                "the ranks that together hold each parameter once."
            )

    def multiply_(self, factor: Tensor) -> None:
        """Multiply all gradients in place by a 0-d FP64 tensor: FP64 gradients in FP64, others in FP32."""
        for device, bucket in self.by_device.items():
            here = on(factor, device)
            wide = [g for g in bucket.tensors if g.dtype is torch.float64]
            narrow = [g for g in bucket.tensors if g.dtype is not torch.float64]
            if wide:
                with writing(*wide):
                    torch._foreach_mul_(wide, here)
            if narrow:
                ops.unscale_(narrow, here.float(), no_overflow(device))
        self.write_back()

    @property
    def widest(self) -> torch.dtype:
        """The dtype of reported norms: FP64 if any gradient is FP64, else FP32."""
        wide = any(bucket.has_float64() for bucket in self.by_device.values())
        return torch.float64 if wide else torch.float32


class Stamp:
    """Records the identity and version of gradients; with ``weak``, without keeping them alive.

    A gradient is unchanged if it is the same tensor with the same version counter. Writes that change no
    version counter (through ``.data``, by a raw collective) are not detected. A gradient without a version
    counter (created in inference mode) never counts as unchanged.
    """

    def __init__(self, grads: list[Tensor], weak: bool = False) -> None:
        self._seen = [TensorWeakRef(grad) for grad in grads] if weak else grads
        self._weak = weak
        self._versions = _versions(grads)

    def matches(self, grads: list[Tensor]) -> bool:
        seen = [ref() for ref in self._seen] if self._weak else self._seen  # type: ignore[operator]
        return self._versions is not None and same_items([grads], seen) and _versions(grads) == self._versions


def _versions(grads: list[Tensor]) -> bytes | list[int] | None:
    """Return the version counters, including those of DTensors' local shards."""
    return versions(grads if PLAIN.issuperset(map(type, grads)) else [*grads, *map(local, grads)])
