"""Mirrors torch.cuda."""

from . import amp

__all__ = ["amp"]
