"""Mirrors torch.cpu.amp."""

from ..amp.cpu import GradScaler

__all__ = ["GradScaler"]
