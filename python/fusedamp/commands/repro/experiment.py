"""The classic experiment: trains a character model in 16 bits with several loss factors, and without
masters."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedamp import optim
from fusedamp.amp.grad_scaler import GradScaler
from fusedamp.commands.demo.models import Embedding, Linear
from fusedamp.commands.demo.options import DTYPES
from fusedamp.commands.demo.tasks import as_bytes, draw, language_reference, split
from fusedamp.optim.core.options import STORAGE

from .options import Options

CONTEXT = 12
HELD_OUT = 4096
EVERY = 10  # steps between the points of a curve
NEVER = 2**31 - 1  # steps until the scale grows
SGD = {"lr": 0.2, "momentum": 0.9}
ADAM = {"lr": 3e-5}
ORDERS = 3  # batch orders for the FP32 runs
FP16_SCALE = 10  # exponent of 2
Make = Callable[..., torch.optim.Optimizer]


class CharModel(nn.Module):
    """Predicts the next byte from the last ones: an embedding and two hidden layers. 16-bit tensors, FP32
    sums."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.letters = Embedding(256, 16)
        self.first, self.second = Linear(16 * CONTEXT, width), Linear(width, width)
        self.head = Linear(width, 256)

    def forward(self, text: Tensor) -> Tensor:
        x = self.letters(text).flatten(1)
        logits: Tensor = self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))
        return logits


@dataclass(frozen=True)
class Setup:
    """One run: the optimizer's options, the weights' format, the loss factor."""

    name: str
    make: Make
    options: dict[str, Any]
    dtype: str = "fp16"
    factor: int | None = None  # exponent of 2; None: no scaler
    order: int = 0  # of the batches


@dataclass
class Result:
    setup: Setup
    curve: list[tuple[int, float]] = field(default_factory=list)  # steps done, training loss
    held_out: float = float("nan")
    vanished: float = 0.0  # share of the last gradient's elements that are 0


class Text:
    """Windows of Python's language reference; its last tenth is held out."""

    def __init__(self) -> None:
        self.learn, keep = split(as_bytes(language_reference()))
        self.held_out = self._windows(keep, torch.linspace(0, len(keep) - CONTEXT - 1, HELD_OUT).long())

    def batch(self, seed: int, step: int, size: int) -> tuple[Tensor, Tensor]:
        return self._windows(self.learn, draw(seed, step, len(self.learn) - CONTEXT - 1, size))

    @staticmethod
    def _windows(text: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
        spans = text[starts[:, None] + torch.arange(CONTEXT + 1)]
        return spans[:, :-1], spans[:, -1]


def setups(options: Options) -> tuple[list[Setup], list[Setup]]:
    """List the runs: loss factors with SGD, and formats of weights with Adam. Both start with FP32 in several
    batch orders.
    """
    sweep, weights = _references(optim.SGD, SGD), _references(optim.AdamW, ADAM)
    sweep += [Setup(f"FP16, factor 2^{factor}", optim.SGD, SGD, factor=factor) for factor in options.factors]
    for dtype in ("fp16", "bf16"):
        for masters in STORAGE["master_weights"]:
            name = f"{dtype.upper()}, {'no masters' if masters == 'none' else f'{masters} masters'}"
            scale = FP16_SCALE if dtype == "fp16" else None
            storage = {**ADAM, "master_weights": masters}
            weights.append(Setup(name, optim.AdamW, storage, dtype, scale))
    return sweep, weights


def _references(make: Make, options: dict[str, Any]) -> list[Setup]:
    first = Setup("FP32", make, options, "fp32")
    others = range(1, ORDERS)
    return [first, *(Setup(f"FP32, batches {k + 1}", make, options, "fp32", order=k) for k in others)]


def train(setup: Setup, text: Text, options: Options, on_step: Callable[[], object]) -> Result:
    """Train one run; all start from the same weights."""
    torch.manual_seed(options.seed)
    model = CharModel(options.width).to(DTYPES[setup.dtype])
    optimizer = setup.make(model.parameters(), **setup.options)
    scaler = GradScaler(
        "cpu",
        init_scale=2.0 ** (setup.factor or 0),
        growth_interval=NEVER,
        enabled=setup.factor is not None,
    )
    result = Result(setup)
    for step in range(options.steps):
        optimizer.zero_grad()
        loss = _loss(model, text.batch(options.seed + setup.order, step, options.batch))
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        scaler.step(optimizer)
        scaler.update()
        if step % EVERY == 0 or step == options.steps - 1:
            result.curve.append((step, loss.item()))
        on_step()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    used = [
        grad for grad in grads if grad is not model.letters.weight.grad
    ]  # bytes that do not occur have no gradient
    result.vanished = sum(int((grad == 0).sum()) for grad in used) / sum(grad.numel() for grad in used)
    with torch.no_grad():
        result.held_out = _loss(model, text.held_out).item()
    return result


def _loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch[0]).float(), batch[1])
