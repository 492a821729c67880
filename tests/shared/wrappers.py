"""A wrapper as trainers have them, and one weight with one gradient, for tests of what the scaler drives."""

import pytest
import torch
from fusedamp import GradScaler, optim
from on_device import DEVICE

SCALE = 1024.0


class Own:
    """As Lightning's and Fabric's wrappers: an optimizer by its class, which forwards all else."""

    def __init__(self, optimizer):
        self._optimizer, self.seen = optimizer, []
        self.__class__ = type("W", (Own, type(optimizer)), {})

    def step(self, closure=None):
        self.seen += gradients(self._optimizer)
        return self._optimizer.step(closure)

    def __getattr__(self, name):
        return getattr(self.__dict__["_optimizer"], name) if "_optimizer" in self.__dict__ else None


def gradients(optimizer):
    return [p.grad.float().mean().item() for group in optimizer.param_groups for p in group["params"]]


class TorchFused(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, lr=lr, fused=True)


KINDS = pytest.mark.parametrize("kind", [optim.SGD, TorchFused], ids=["ours", "torch fused"])


def weight(dtype, grad=2.0):
    param = torch.ones(1, dtype=dtype, requires_grad=True)
    param.grad = torch.full_like(param, grad * SCALE)
    return param


def started(**options):
    scaler = GradScaler(DEVICE, init_scale=SCALE, **options)
    scaler.scale(torch.ones(()))
    return scaler
