"""Optimizers with FP32 master weights: drop-in for ``torch.optim``, fused with ``fusedamp.GradScaler``."""

from .adagrad import Adagrad
from .adam import Adam, AdamW
from .lion import Lion
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adagrad", "Adam", "AdamW", "Lion", "RAdam", "RMSprop"]
