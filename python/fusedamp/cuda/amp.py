"""Mirrors torch.cuda.amp."""

from ..amp.cuda import GradScaler

__all__ = ["GradScaler"]
