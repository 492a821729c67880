"""Optimizers with FP32 master weights: drop-in for ``torch.optim``, fused with ``fusedamp.GradScaler``."""

from .adafactor import Adafactor
from .adagrad import Adagrad
from .adam import Adam, AdamW
from .in_backward import step_in_backward
from .layerwise import LAMB, LARS, NovoGrad
from .lion import Lion
from .muon import Muon
from .nadam import NAdam
from .offload.offloaded import Offloaded
from .radam import RAdam
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = [
    "LAMB",
    "LARS",
    "SGD",
    "Adafactor",
    "Adagrad",
    "Adam",
    "AdamW",
    "Lion",
    "Muon",
    "NAdam",
    "NovoGrad",
    "Offloaded",
    "RAdam",
    "RMSprop",
    "step_in_backward",
]
