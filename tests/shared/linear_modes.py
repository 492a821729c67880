"""Linear layers in the two modes with FP32 weight gradients, on numbers that all formats hold."""

import torch
from fusedamp.nn import functional
from on_device import DEVICE


def whole(*shape, seed=0):
    """Small whole numbers: every product and sum is exact in all formats up to 256."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def layer(k=5, n=3, seed=1):
    weight, bias = torch.nn.Parameter(whole(n, k, seed=seed)), torch.nn.Parameter(whole(n, seed=seed + 1))
    return weight, bias


class Mode:
    """FP32 weights under autocast, or 16-bit weights with FP32 gradients."""

    def __init__(self, name):
        self.name = name

    def parameters(self, *args):
        made = layer(*args)
        if self.name == "autocast":
            return made
        made = [torch.nn.Parameter(p.detach().bfloat16()) for p in made]
        for p in made:
            p.grad_dtype = torch.float32
        return made

    def linear(self, x, weight, bias=None):
        if self.name == "autocast":
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return functional.linear(x, weight, bias)
        return functional.linear(x.bfloat16(), weight, bias)


MODES = ["autocast", "grad_dtype"]


def reference(x, weight, bias, dy):
    """Gradients of x, weight and bias."""
    return dy @ weight.detach().float(), dy.t() @ x, dy.sum(0)
