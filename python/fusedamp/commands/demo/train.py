"""Training runs, one per (stack, format, masters), in lockstep on the same batches."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fusedamp import optim
from fusedamp.amp.grad_scaler import GradScaler
from fusedamp.commands.demo.options import DTYPES, DemoError, Options
from fusedamp.commands.demo.tasks import Batch, Task
from fusedamp.numerics import Watch, watch
from fusedamp.optim.state.encoded import plain
from fusedamp.optim.state.formats import Storage

GROWTH_INTERVAL = 50  # torch's default of 2000 steps would never be reached here
MAX_NORM = 1.0
MAX_ATTEMPTS = 100
EVALUATIONS = 12
EXTRA_ORDERS = 3
RECORDED = 10  # every so many steps a watched run has a record


@dataclass(frozen=True)
class Variant:
    """The stack, the formats of weights, masters and states, the batch order and the policy of the loss scale
    of one run."""

    stack: str  # "torch" or "fusedamp"
    dtype: str
    storage: Storage = field(default_factory=Storage)  # fusedamp's
    order: int = 0
    policy: Literal["overflow", "headroom"] = "overflow"

    @property
    def masters(self) -> bool:
        return self.storage.get("master_weights") != "none"

    @property
    def name(self) -> str:
        return self.label if self.policy == "overflow" else f"{self.label}, {self.policy}"

    @property
    def label(self) -> str:
        """The name without the policy, for narrow columns."""
        if self.order:
            return f"FP32 torch, batch order {self.order + 1}"
        amp = " AMP" if self.stack == "torch" and self.dtype != "fp32" else ""
        return f"{self.dtype.upper()} {self.stack}{amp}{''.join(f', {word}' for word in self._words())}"

    def _words(self) -> Iterator[str]:
        masters, states = self.storage.get("master_weights", "auto"), self.storage.get("state_dtype", "auto")
        yield from {
            "none": ["no masters"],
            "split": ["split masters"],
            "fp32": ["FP32 masters"],
        }.get(str(masters), [])
        if self.storage.get("stochastic_rounding"):
            yield "stochastic rounding"
        yield from {"bfloat16": ["BF16 states"], "int8": ["8-bit states"]}.get(str(states), [])


REFERENCE = Variant("torch", "fp32")
NO_MASTERS = Storage(master_weights="none")


def variants(dtypes: tuple[str, ...], policy: Literal["overflow", "headroom"] = "overflow") -> list[Variant]:
    """List the FP32 reference, every requested format in both stacks, and FP32 with other batch orders.
    ``policy``: of fusedamp's FP16 runs."""
    rows = [REFERENCE]
    for dtype in dtypes:
        if dtype == "fp32":
            rows.append(Variant("fusedamp", dtype))
        else:
            ours = replace(Variant("fusedamp", dtype), policy=policy if dtype == "fp16" else "overflow")
            rows += [Variant("torch", dtype), ours, replace(ours, storage=NO_MASTERS)]
    return rows + [Variant("torch", "fp32", order=k) for k in range(1, EXTRA_ORDERS + 1)]


@dataclass
class Run:
    """One model with its optimizer, scaler and recorded metrics."""

    variant: Variant
    model: nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    device: torch.device
    losses: list[float] = field(default_factory=list)  # one per step
    scales: list[float] = field(default_factory=list)  # one per attempt
    skipped: list[int] = field(default_factory=list)  # which attempts overflowed
    evaluations: list[tuple[int, float, float]] = field(default_factory=list)  # steps done, loss, accuracy
    lost: dict[str, float] = field(default_factory=dict)  # format -> `lost_updates` halfway
    watch: Watch | None = None

    @classmethod
    def start(cls, variant: Variant, base: nn.Module, options: Options) -> Run:
        """Start from a copy of ``base``: torch keeps its weights in FP32, fusedamp casts them to
        ``dtype``."""
        model, lr = copy.deepcopy(base), options.learning_rate
        settings: dict[str, Any] = dict(
            init_scale=options.init_scale,
            growth_interval=GROWTH_INTERVAL,
            enabled=variant.dtype == "fp16",
        )
        scaler: torch.amp.GradScaler
        if variant.stack == "torch":
            scaler = torch.amp.GradScaler(options.device.type, **settings)
        else:
            scaler = GradScaler(options.device.type, **settings, policy=variant.policy)
        optimizer: torch.optim.Optimizer
        if variant.stack == "torch":
            optimizer = torch.optim.AdamW(model.parameters(), lr=lr, fused=True)
        else:
            model.to(DTYPES[variant.dtype])
            optimizer = optim.AdamW(model.parameters(), lr=lr, **variant.storage)
        run = cls(variant, model, optimizer, scaler, options.device)
        if options.numerics and isinstance(scaler, GradScaler) and scaler.is_enabled() and variant.masters:
            every = min(options.steps or RECORDED, RECORDED)
            run.watch = watch(optimizer, scaler, every=every, history=1000, model=model)
        return run

    def step(self, batch: Batch) -> None:
        """Train on ``batch``; if gradients overflow, the scaler backs off and the batch is repeated."""
        for _ in range(MAX_ATTEMPTS):
            if self._attempt(batch):
                return
        raise DemoError(
            f"{self.variant.name} overflowed {MAX_ATTEMPTS} times in a row at step {len(self.losses)}, down"
            f" to scale {self.scaler.get_scale():g}: the weights are no longer finite; try a smaller --lr"
        )

    def _attempt(self, batch: Batch) -> bool:
        self.optimizer.zero_grad()
        loss, _ = self.loss(batch)
        before = self.scaler.get_scale()
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        if isinstance(self.scaler, GradScaler):
            self.scaler.clip_grad_norm_(self.optimizer, MAX_NORM)
        else:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), MAX_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scales.append(before)
        if isinstance(self.scaler, GradScaler):  # its scale may come down without an overflow
            skipped = bool(self.scaler.last_step_skipped)
        else:
            skipped = self.scaler.get_scale() < before
        if skipped:
            self.skipped.append(len(self.scales) - 1)
            return False
        self.losses.append(loss.item())
        return True

    @torch.no_grad()
    def evaluate(self, batch: Batch) -> None:
        """Record loss and accuracy on the held-out batch."""
        loss, accuracy = self.loss(batch)
        self.evaluations.append((len(self.losses), loss.item(), accuracy.item()))

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x, y = (tensor.to(self.device) for tensor in batch)
        if x.is_floating_point():
            x = x.to(next(self.model.parameters()).dtype)
        autocast = self.variant.stack == "torch" and self.variant.dtype != "fp32"
        with torch.autocast(self.device.type, DTYPES[self.variant.dtype]) if autocast else nullcontext():
            logits = self.model(x).float().flatten(0, -2)
        return F.cross_entropy(logits, y.flatten()), (logits.argmax(1) == y.flatten()).float().mean()

    def weights(self) -> list[Tensor]:
        """Return a copy of the parameters."""
        return [parameter.detach().clone() for parameter in self.model.parameters()]

    @property
    def train_loss(self) -> float:
        """Return the mean loss over the last 20 batches."""
        tail = self.losses[-20:]
        return sum(tail) / len(tail)

    @property
    def held_out_loss(self) -> float:
        return self.evaluations[-1][1]

    @property
    def bytes_per_param(self) -> float:
        """Return the current bytes of weights, gradients, masters and states per parameter."""
        parameters = list(self.model.parameters())
        entries = self.optimizer.state.values()
        state = [plain(value) for entry in entries for value in entry.values() if isinstance(value, Tensor)]
        held = [*parameters, *(p.grad for p in parameters if p.grad is not None), *state]
        return sum(t.numel() * t.element_size() for t in held) / sum(p.numel() for p in parameters)


def lost_updates(before: list[Tensor], after: list[Tensor], dtype: torch.dtype) -> float:
    """Return the share of updates that rounding to a ``dtype`` weight without a master would lose."""
    lost = moved = 0
    for old, new in zip(before, after, strict=True):
        update, rounded = new - old, old.to(dtype)
        stays = (rounded.float() + update).to(dtype) == rounded
        lost += int((stays & (update != 0)).sum())
        moved += int((update != 0).sum())
    return lost / max(moved, 1)


def pretrain(task: Task, options: Options, on_step: Callable[[], None]) -> nn.Module:
    """Train the common starting point: plain FP32, torch's AdamW, a large learning rate."""
    torch.manual_seed(options.seed)
    model = task.make_model().to(options.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.pretrain_lr, fused=True)
    run = Run(REFERENCE, model, optimizer, torch.amp.GradScaler(enabled=False), options.device)
    for step in range(task.pretrain_steps):
        run.step(task.pretrain(options.seed, step))
        on_step()
    return model


def finetune(
    task: Task, base: nn.Module, options: Options, compared: list[Variant] | None = None
) -> Iterator[list[Run]]:
    """Train ``compared`` in lockstep, by default the `variants` of the requested formats; yields the runs
    after each step, the reference first."""
    runs = [
        Run.start(variant, base, options) for variant in compared or variants(options.dtypes, options.policy)
    ]
    every = max(1, task.steps // EVALUATIONS)
    for step in range(task.steps):
        if step % every == 0:
            _evaluate(runs, task)
        before = runs[0].weights() if step == task.steps // 2 else []
        for run in runs:
            run.step(task.finetune(options.seed + run.variant.order, step))
        if before:
            after = runs[0].weights()
            runs[0].lost = {name: lost_updates(before, after, DTYPES[name]) for name in ("fp16", "bf16")}
        if step == task.steps - 1:
            _evaluate(runs, task)
        yield runs


def _evaluate(runs: list[Run], task: Task) -> None:
    for run in runs:
        run.evaluate(task.held_out)
