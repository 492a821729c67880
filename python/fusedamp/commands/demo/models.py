"""The two networks, and the function that runs all of their products and sums."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def multiply(op: Callable[..., Tensor], *tensors: Tensor, **options: object) -> Tensor:
    """Run ``op`` with the arithmetic of tensor cores: 16-bit inputs and outputs, products and sums in FP32.

    On a GPU the hardware and torch.autocast do this. On a CPU without FP16 arithmetic torch's FP16 products
    are very slow, so there the 16-bit values are converted to FP32, ``op`` runs in FP32, and its result is
    rounded; autograd rounds the gradients at the same places.
    """
    device = tensors[0].device.type
    autocasting = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocasting else tensors[-1].dtype
    if device != "cpu" or dtype == torch.float32:
        return op(*tensors, **options)
    with torch.autocast(device, enabled=False):
        wide = [t.to(dtype).float() if t.is_floating_point() else t for t in tensors]
        return op(*wide, **options).to(dtype)


class Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return multiply(F.linear, x, self.weight, self.bias)


class Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        assert self.bias is not None
        return multiply(F.conv2d, x, self.weight, self.bias, padding=self.padding, stride=self.stride)


class Embedding(nn.Embedding):
    def forward(self, index: Tensor) -> Tensor:
        return multiply(F.embedding, index, self.weight)  # its backward sums over all uses of a row


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = Linear(width, 3 * width), Linear(width, width)
        self.widen, self.narrow = Linear(width, 4 * width), Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm_attention(x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        mixed = multiply(F.scaled_dot_product_attention, q, k, v, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).reshape(batch, length, width))
        result: Tensor = x + self.narrow(F.gelu(self.widen(self.norm_mlp(x))))
        return result


class GPT(nn.Module):
    """A GPT on bytes: pre-norm blocks, learned positions."""

    def __init__(self, context: int = 64, width: int = 96, depth: int = 2, heads: int = 3) -> None:
        super().__init__()
        self.token, self.place = Embedding(256, width), Embedding(context, width)
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), Linear(width, 256)
        for table in (self.token, self.place):
            nn.init.normal_(table.weight, std=0.1)

    def forward(self, text: Tensor) -> Tensor:
        x = self.token(text) + self.place(torch.arange(text.shape[1], device=text.device))
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class ConvNet(nn.Module):
    """Two convolutions and two linear layers on 8 x 8 images."""

    def __init__(self, channels: int = 16, hidden: int = 64, classes: int = 10) -> None:
        super().__init__()
        self.first = Conv2d(1, channels, 3, padding=1)
        self.second = Conv2d(channels, 2 * channels, 3, padding=1)
        self.hidden, self.head = Linear(2 * channels * 16, hidden), Linear(hidden, classes)

    def forward(self, image: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.second(F.relu(self.first(image)))), 2)
        logits: Tensor = self.head(F.relu(self.hidden(x.flatten(1))))
        return logits
