"""Replaces torch's scalers with fusedamp's, for trainers that construct torch's."""

from __future__ import annotations

import contextlib
import importlib
from types import TracebackType

from . import cpu, cuda
from .grad_scaler import GradScaler

_PLACES: dict[str, type] = {
    "torch": GradScaler,
    "torch.amp": GradScaler,
    "torch.amp.grad_scaler": GradScaler,
    "torch.cuda.amp": cuda.GradScaler,
    "torch.cuda.amp.grad_scaler": cuda.GradScaler,
    "torch.cpu.amp": cpu.GradScaler,
    "torch.cpu.amp.grad_scaler": cpu.GradScaler,
}
_originals: dict[str, type] = {}
_users = 0


class patch_torch:
    """Replace ``torch.amp.GradScaler``, ``torch.cuda.amp.GradScaler`` and their other names with fusedamp's
    scalers.

    Takes effect immediately, until :meth:`restore` or the end of a ``with`` block::

        with fusedamp.patch_torch():
            accelerator = accelerate.Accelerator(mixed_precision="fp16")

    Patches can be nested and restored in any order; the last one restores torch's classes. A module that ran
    ``from torch.amp import GradScaler`` before keeps torch's class. Existing scalers are unaffected, but
    cannot be pickled while a patch is active.
    """

    def __init__(self) -> None:
        global _users
        self._active = True
        _users += 1
        if _users > 1:
            return
        with contextlib.suppress(ImportError):
            # Its class derives from torch.amp.GradScaler at first import, which must be torch's.
            importlib.import_module("torch.distributed.fsdp.sharded_grad_scaler")
        for place, ours in _PLACES.items():
            module = importlib.import_module(place)
            _originals[place] = module.GradScaler
            module.GradScaler = ours  # type: ignore[attr-defined]

    def restore(self) -> None:
        """End this patch; further calls have no effect."""
        global _users
        if not self._active:
            return
        self._active = False
        _users -= 1
        if _users == 0:
            for place, original in _originals.items():
                importlib.import_module(place).GradScaler = original  # type: ignore[attr-defined]

    def __enter__(self) -> patch_torch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()
