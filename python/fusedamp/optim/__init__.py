"""Optimizers with FP32 master weights: drop-in for ``torch.optim``, fused with ``fusedamp.GradScaler``."""

from .adam import Adam, AdamW
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW"]
