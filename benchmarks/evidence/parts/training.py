"""A training step of GPT-2 size against torch AMP: time, peak memory and losses."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import fusedamp
import torch
from torch import Tensor, nn
from torch.nn import functional

from ..place import Place


@dataclass(frozen=True)
class Size:
    vocabulary: int
    context: int
    width: int
    heads: int
    layers: int
    batch: int
    steps: int


GPT2 = Size(50_304, 1_024, 768, 12, 12, 8, 20)
TINY = Size(64, 16, 16, 2, 1, 2, 4)


class Block(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.heads = size.heads
        self.norms = nn.ModuleList(nn.LayerNorm(size.width) for _ in range(2))
        self.qkv, self.out = nn.Linear(size.width, 3 * size.width), nn.Linear(size.width, size.width)
        self.up, self.down = nn.Linear(size.width, 4 * size.width), nn.Linear(4 * size.width, size.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        split = self.qkv(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = (split[:, :, i].transpose(1, 2) for i in range(3))
        mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(functional.gelu(self.up(self.norms[1](x)), approximate="tanh"))


class Model(nn.Module):
    """GPT-2 (Radford et al. 2019), with the output tied to the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.words, self.places = (
            nn.Embedding(size.vocabulary, size.width),
            nn.Embedding(size.context, size.width),
        )
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        for table in (self.words, self.places):
            nn.init.normal_(table.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        for block in self.blocks:
            x = block(x)
        return functional.linear(self.norm(x), self.words.weight)


@dataclass(frozen=True)
class Recipe:
    name: str
    amp: Callable[..., Any]  # the scaler
    optimizer: Callable[..., torch.optim.Optimizer]
    autocast: bool  # otherwise the model is 16-bit, with FP32 masters
    dtype: torch.dtype
    clip: Callable[[Any, Any, list[Tensor]], object]


OPTIONS: dict[str, Any] = dict(lr=3e-4, betas=(0.9, 0.95), weight_decay=0.1)


def torchs(scaler: Any, optimizer: Any, params: list[Tensor]) -> object:
    scaler.unscale_(optimizer)
    return nn.utils.clip_grad_norm_(params, 1.0)


def ours(scaler: Any, optimizer: Any, params: list[Tensor]) -> object:
    return scaler.clip_grad_norm_(optimizer, 1.0)


def torch_fused(params: list[Tensor]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, **OPTIONS, fused=True)


def fusedamp_adamw(params: list[Tensor]) -> torch.optim.Optimizer:
    return fusedamp.optim.AdamW(params, **OPTIONS)


RECIPES = [
    Recipe(
        "torch AMP, FP16 autocast, fused AdamW",
        torch.amp.GradScaler,
        torch_fused,
        True,
        torch.float16,
        torchs,
    ),
    Recipe("fusedamp, FP16 autocast", fusedamp.GradScaler, fusedamp_adamw, True, torch.float16, ours),
    Recipe(
        "torch AMP, BF16 autocast, fused AdamW",
        torch.amp.GradScaler,
        torch_fused,
        True,
        torch.bfloat16,
        torchs,
    ),
    Recipe(
        "fusedamp, BF16 weights with masters",
        fusedamp.GradScaler,
        fusedamp_adamw,
        False,
        torch.bfloat16,
        ours,
    ),
    Recipe(
        "fusedamp, FP16 weights with masters", fusedamp.GradScaler, fusedamp_adamw, False, torch.float16, ours
    ),
]


def train(place: Place, recipe: Recipe, size: Size) -> dict[str, Any]:
    device, cuda = place.device, place.device == "cuda"
    torch.manual_seed(0)
    model = Model(size).to(device)
    if not recipe.autocast:
        model = model.to(recipe.dtype)
    params = list(model.parameters())
    optimizer, scaler = recipe.optimizer(params), recipe.amp(device, init_scale=2.0**12)
    draw = torch.Generator().manual_seed(1)
    shape = (size.batch, size.context + 1)
    batches = [torch.randint(size.vocabulary, shape, generator=draw).to(device) for _ in range(2)]
    losses, times, tails = [], [], []
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for step in range(size.steps):
        tokens = batches[step % 2]
        marks = [_now(cuda)]
        with torch.autocast(device, recipe.dtype, enabled=recipe.autocast):
            logits = model(tokens[:, :-1])
            loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
        scaler.scale(loss).backward()
        marks.append(_now(cuda))
        recipe.clip(scaler, optimizer, params)
        scaler.step(optimizer)
        scaler.update()
        marks.append(_now(cuda))
        optimizer.zero_grad()
        losses.append(loss.detach())
        if cuda:
            torch.cuda.synchronize()
        times.append(_between(marks[0], marks[2]))
        tails.append(_between(marks[1], marks[2]))
    values = [float(loss) for loss in losses]
    warm = min(5, size.steps // 2)
    return {
        "recipe": recipe.name,
        "step_ms": median(times[warm:]),
        "optimizer_phase_ms": median(tails[warm:]),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if cuda else None,
        "scale": scaler.get_scale(),
        "first_loss": values[0],
        "last_loss": values[-1],
        "losses": values,
    }


def _now(cuda: bool) -> Any:
    if not cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(start: Any, end: Any) -> float:
    return (end - start) * 1e3 if isinstance(start, float) else start.elapsed_time(end)


def run(place: Place) -> None:
    size = place.sized(GPT2, TINY)
    place.note("size", vars(size))
    runs: list[dict[str, Any]] = []
    for recipe in place.sized(RECIPES, [*RECIPES[:4], RECIPES[-1]]):
        with place.attempt(recipe.name):
            runs.append(train(place, recipe, size))
            values = runs[-1]["losses"]
            assert all(v == v for v in values), f"losses {values}"
            assert values[-1] < values[1], f"the loss of a batch did not fall: {values}"
        gc.collect()
        if place.device == "cuda":
            torch.cuda.empty_cache()
        place.note("runs", runs)
    by_name = {run["recipe"]: run for run in runs}
    pair = [by_name[recipe.name] for recipe in RECIPES[:2] if recipe.name in by_name]
    if len(pair) == 2:  # the same weights, tokens and formats: only rounding differs
        gap = max(abs(a - b) for a, b in zip(*(p["losses"] for p in pair), strict=True))
        place.note("loss_gap_to_torch_amp", gap)
        place.check("the losses of torch AMP", gap < 0.05, f"they differ by up to {gap:.4f}")
