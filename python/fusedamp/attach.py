"""The read pass in backward: each large gradient is read as it appears, while it is still in the cache.

What a hook finds counts in ``step`` only while nothing has changed: the gradient is the same tensor with the
same version counter, the scale too. Every other gradient is read in ``step``, as without hooks. The results
are the same bit for bit (up to 32,768 gradients on a device; the norm of more is added in another order).
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import TensorWeakRef

from . import ops
from .gradients import Gradients, on
from .overflow import params_of
from .packed import Fields, read

if TYPE_CHECKING:
    from .grad_scaler import GradScaler

# Elements of a gradient. The cache saves about as much time for 2**19 of them as a call of its own costs.
WORTH_A_CALL = 2**20


@dataclass(slots=True)
class _Finding:
    """What one hook read, and from what."""

    grad: TensorWeakRef
    version: int
    scale: Tensor
    scale_version: int
    stats: ops.GradStats
    stream: torch.cuda.Stream | None  # on which the statistics come to be

    def holds(self, grad: Tensor, scale: Tensor) -> bool:
        return (
            self.version == grad._version
            and self.scale is scale
            and self.scale_version == scale._version
            and self.grad() is grad
        )


class Attachment:
    """The hooks of one scaler on the parameters of one optimizer; :meth:`fusedamp.GradScaler.attach` makes
    it.

    It keeps neither alive, and goes when either does.
    """

    def __init__(self, scaler: GradScaler, optimizer: Optimizer, norm_type: float, min_numel: int) -> None:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"[GradScaler.attach] optimizer is a {type(optimizer).__name__}; expected a "
                "torch.optim.Optimizer. Attach the optimizer that you step."
            )
        if not isinstance(min_numel, int) or min_numel < 0:
            raise ValueError(
                f"[GradScaler.attach] min_numel is {min_numel!r}; expected a whole number >= 0. "
                "Use 0 to read every gradient in backward."
            )
        self.norm_type, self._min_numel = norm_type, min_numel
        self._scaler, self._optimizer = weakref.ref(scaler), weakref.ref(optimizer)
        self._hooked: list[int] = []  # ids of the parameters, of which any may have died
        self._handles: list[RemovableHandle] = []
        self._found: dict[int, _Finding] = {}  # by id of the parameter
        self._inverses: dict[tuple[torch.device, torch.cuda.Stream | None], tuple[Tensor, int, Tensor]] = {}
        if scaler.is_enabled():
            self._hook(params_of(optimizer))

    def remove(self) -> None:
        """Take all hooks away; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._hooked = [], []
        self._found.clear()
        self._inverses.clear()
        scaler, optimizer = self._scaler(), self._optimizer()
        if scaler is not None and optimizer is not None and scaler._attached.get(optimizer) is self:
            del scaler._attached[optimizer]

    def _hook(self, params: list[Tensor]) -> None:
        """Put hooks on exactly ``params``: groups are added, and trainers exchange the parameters in them."""
        present = list(map(id, params))
        if present == self._hooked:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = [
            param.register_post_accumulate_grad_hook(self._see)
            for param in dict.fromkeys(params)
            if param.requires_grad and param.is_leaf
        ]
        self._hooked = present
        self._found = {key: self._found[key] for key in present if key in self._found}

    def _see(self, param: Tensor) -> None:
        grad = param.grad
        if grad is not None and grad.numel() >= self._min_numel:
            self._read_early(param, grad)

    @torch._disable_dynamo  # compiled autograd would trace it, and freeze what is remembered
    @torch.no_grad()
    def _read_early(self, param: Tensor, grad: Tensor) -> None:
        scaler = self._scaler()
        if scaler is None or self._optimizer() is None:
            self.remove()
            return
        scale, fields = scaler._scale, read([grad])
        if scale is None or fields is None or _must_wait(grad):
            return
        stream = torch.cuda.current_stream(grad.device) if grad.is_cuda else None
        stats = ops._grad_stats([grad], self._inverse(scaler, grad.device, stream), self.norm_type, fields)
        self._found[id(param)] = _Finding(
            TensorWeakRef(grad), grad._version, scale, scale._version, stats, stream
        )

    def _inverse(self, scaler: GradScaler, device: torch.device, stream: torch.cuda.Stream | None) -> Tensor:
        """1/scale for work on ``stream``; made there, so that nothing has to wait for another stream."""
        scale = scaler._scale
        assert scale is not None
        known = self._inverses.get((device, stream))
        if known is None or known[0] is not scale or known[1] != scale._version:
            known = (scale, scale._version, on(scaler._inverse(), device))
            self._inverses[device, stream] = known
        return known[2]

    def stats(
        self,
        params: Sequence[Tensor],
        gradients: Gradients,
        scale: Tensor,
        inv_scale: Tensor,
        norm_type: float,
    ) -> dict[torch.device, ops.GradStats]:
        """As ``gradients.stats``, reading only what no hook has read or what has changed since.

        Args:
            params: the optimizer's; ``gradients`` are theirs.
        """
        self._hook(list(params))
        if norm_type != self.norm_type or not self._found:
            return gradients.stats(inv_scale, norm_type)
        found = {}
        for device, bucket in gradients.by_device.items():
            if not bucket.tensors:
                continue
            known = [self._found.get(id(params[position])) for position in bucket.positions]
            fresh = [
                finding if finding is not None and finding.holds(grad, scale) else None
                for finding, grad in zip(known, bucket.tensors, strict=True)
            ]
            if not any(fresh) or _must_wait(bucket.tensors[0]):
                fresh = [None] * len(fresh)
            found[device] = _combined(fresh, bucket.tensors, on(inv_scale, device), norm_type, bucket.fields)
        return found


def _must_wait(grad: Tensor) -> bool:
    """Whether what a hook sees is not yet what ``step`` will, and no version counter would tell.

    Ranks reduce their gradients after the hooks by raw writes; a captured graph rewrites them at each replay.
    """
    ranks = torch.distributed.is_available() and torch.distributed.is_initialized()
    if ranks and torch.distributed.get_world_size() > 1:
        return True
    return grad.is_cuda and torch.cuda.is_current_stream_capturing()


def _combined(
    fresh: list[_Finding | None],
    grads: list[Tensor],
    inv_scale: Tensor,
    norm_type: float,
    fields: Fields | None,
) -> ops.GradStats:
    """The statistics of ``grads`` in their order: found by hooks where fresh, read in one call elsewhere."""
    missing = [grad for finding, grad in zip(fresh, grads, strict=True) if finding is None]
    if len(missing) == len(grads):
        return ops._grad_stats(grads, inv_scale, norm_type, fields)
    rest = ops._grad_stats(missing, inv_scale, norm_type) if missing else None
    parts: list[tuple[Tensor, Tensor]] = []
    used = 0
    for is_missing, run in groupby(fresh, lambda finding: finding is None):
        findings = list(run)
        if is_missing:
            assert rest is not None
            rows = slice(used, used := used + len(findings))
            parts.append((rest.per_tensor[rows], rest.counts[rows]))
        else:
            parts += [_settled(finding) for finding in findings if finding is not None]
    per_tensor, counts = (torch.cat(column) for column in zip(*parts, strict=True))
    # Added by the op that adds them in a read pass, so in the same order.
    total = ops._grad_stats([per_tensor], None, math.inf if norm_type == math.inf else 1.0).total
    return ops.GradStats(counts.any().float(), total, per_tensor, counts)


def _settled(finding: _Finding) -> tuple[Tensor, Tensor]:
    per_tensor, counts = finding.stats.per_tensor, finding.stats.counts
    if finding.stream is not None:
        here = torch.cuda.current_stream(per_tensor.device)
        if here != finding.stream:  # backward has made it wait; the allocator must know as well
            per_tensor.record_stream(here)
            counts.record_stream(here)
    return per_tensor, counts
