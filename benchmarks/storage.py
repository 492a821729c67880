"""``--storage``: time of formats of masters and states, stochastic rounding, and norms of tensors.

Both sides are fusedamp. Bytes per parameter, for weights of w bytes, masters of m and states of s: the
gradient check w, the update r(w + w + m + s) w(w + m + s); a rule with norms of whole tensors reads
everything twice.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from fusedamp.optim.state.formats import Storage
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch import Tensor

from .contenders import DTYPES, Fusedamp
from .duel import NO_CLIPPING, NOISE, WrongResult
from .machine import Machine
from .report import QUICK, as_percent
from .results import write_csv
from .stream import Stream
from .timing import Budget, Limits, Timing, alternate, percentile
from .workloads import WORKLOADS, numel

SECONDS, QUICK_SECONDS = 400.0, 30.0
STATES = {"adamw": 2, "lamb": 2, "sgd": 1, "lars": 1, "lion": 1}
NORMS = ("lamb", "lars")
STATE_BYTES = {torch.float32: 4.0, torch.bfloat16: 2.0, "int8": 1 + 4 / 128}
MASTER_BYTES = {"fp32": 4, "split": 2, "none": 0}
CHECKED, STEPS = 100_000, 20
FAR = 0.25  # of the distance moved; masters are closer to FP32 ones in every state format


@dataclass(frozen=True)
class Side:
    optimizer: str
    dtype: str
    masters: str = "fp32"  # of 16-bit weights
    states: torch.dtype | str = torch.float32
    stochastic: bool = False

    @property
    def options(self) -> Storage:
        masters = "none" if self.dtype == "fp32" else self.masters
        return Storage(master_weights=masters, state_dtype=self.states, stochastic_rounding=self.stochastic)

    @property
    def bytes(self) -> float:
        weight = DTYPES[self.dtype].itemsize
        kept = STATES[self.optimizer] * STATE_BYTES[self.states]
        if self.dtype != "fp32":
            kept += MASTER_BYTES[self.masters]
        norms = 2 * weight + kept if self.optimizer in NORMS else 0
        return weight + norms + (2 * weight + kept) + (weight + kept)

    @property
    def name(self) -> str:
        states = {torch.float32: "FP32", torch.bfloat16: "BF16", "int8": "8-bit"}[self.states]
        masters = {"fp32": "FP32 masters", "split": "split masters", "none": "no masters"}[self.masters]
        rounding = ", stochastic rounding" if self.stochastic else ""
        weights = "" if self.dtype == "fp32" else f"{masters}{rounding}, "
        return f"{self.optimizer}, {self.dtype.upper()}, {weights}{states} states"


def pairs() -> list[tuple[Side, Side]]:
    """List each mode with its reference."""
    found = []
    for optimizer, dtype in (("adamw", "bf16"), ("adamw", "fp16"), ("sgd", "bf16"), ("lion", "bf16")):
        plain = Side(optimizer, dtype)
        for states in STATE_BYTES:
            found.append((Side(optimizer, dtype, "split", states), plain))
        for states in STATE_BYTES:
            nearest = Side(optimizer, dtype, "none", states)
            found.append((Side(optimizer, dtype, "none", states, stochastic=True), nearest))
    for states in (torch.bfloat16, "int8"):
        found.append((Side("adamw", "fp32", states=states), Side("adamw", "fp32")))
    found.append((Side("lamb", "bf16"), Side("adamw", "bf16")))
    found.append((Side("lars", "bf16"), Side("sgd", "bf16")))
    return found


class Pair:
    """Both sides in memory, with the same weights and gradients."""

    def __init__(self, mode: Side, plain: Side, count: int) -> None:
        dtype = DTYPES[mode.dtype]
        self._noise = torch.randn(NOISE, generator=torch.Generator().manual_seed(0)).to(dtype)
        self.grads = [torch.empty(count, dtype=dtype)]
        self._start = self._filled(torch.empty(count, dtype=dtype)).mul_(0.05)
        self.refill()
        self.sides = [
            Fusedamp(s.optimizer, [self._start.clone()], self.grads, NO_CLIPPING, s.options)
            for s in (mode, plain)
        ]

    def refill(self) -> None:
        self._filled(self.grads[0])

    def _filled(self, tensor: Tensor) -> Tensor:
        for part in tensor.split(NOISE):
            part.copy_(self._noise[: part.numel()])
        return tensor

    def apart(self) -> float:
        """Return the distance between the sides' weights over the distance that the second has moved."""
        ours, theirs = (side.weights[0].detach().float() for side in self.sides)
        return float((ours - theirs).norm() / (theirs - self._start.float()).norm())


def checked(mode: Side, plain: Side) -> float:
    """Return `Pair.apart` after some steps; raises WrongResult if it is too large."""
    pair = Pair(mode, plain, CHECKED)
    for _ in range(STEPS):
        for side in pair.sides:
            pair.refill()
            side.phase()
    apart = pair.apart()
    if mode.optimizer == plain.optimizer and not mode.stochastic and not apart <= FAR:
        raise WrongResult(f"{mode.name} differs by {apart:.2g} of the distance moved from {plain.name}")
    return apart


@dataclass(frozen=True)
class Point:
    mode: Side
    plain: Side
    numel: int
    timing: Timing
    apart: float
    stream_bytes: int

    @property
    def share(self) -> float:
        """Return our bandwidth over that of the paired stream."""
        return percentile(self.timing.roof_ratios(), 50) * self.mode.bytes * self.numel / self.stream_bytes

    def record(self, machine: Machine) -> dict[str, object]:
        ratios = self.timing.ratios()
        return {
            "mode": self.mode.name,
            "against": self.plain.name,
            "threads": self.timing.threads,
            "clock": self.timing.clock,
            "numel": self.numel,
            "bytes": self.mode.bytes,
            "against_bytes": self.plain.bytes,
            **{f"ratio_p{percent}": percentile(ratios, percent) for percent in (20, 50, 80)},
            "share_of_stream": self.share,
            "clean": len(self.timing.clean),
            "dropped": self.timing.dropped,
            "apart": self.apart,
            **vars(machine),
        }


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all pairs; write CSV and report."""
    count = numel(WORKLOADS["W1"].shapes(options.quick))
    budget = Budget(QUICK_SECONDS if options.quick else SECONDS, len(pairs()) * len(options.threads), 6)
    stream, points = Stream(count // 2), []
    for mode, plain in track(pairs(), "storage", console=console):
        apart, pair = checked(mode, plain), Pair(mode, plain, count)
        ours, theirs = (side.phase for side in pair.sides)
        for threads in options.threads:
            limits = Limits(options.samples, budget.share())
            timing = alternate(ours, theirs, pair.refill, stream, threads, limits)
            points.append(Point(mode, plain, count, timing, apart, stream.bytes))
    name = f"{machine.kind}-storage" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [point.record(machine) for point in points])
    text = report(points, machine, options.quick)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    console.print("Written:", *(f"{out / name}{ending}" for ending in (".csv", ".md")), soft_wrap=True)
    return 0


METHOD = """\
A full optimizer step of fusedamp (unscale, overflow check, clip, step, scale update) in each format of
masters and states, on one tensor of {count:,} elements. **Numbers are speedups over the reference mode**,
measured alternately in one process: the median over pairs of samples, then the 20th to 80th percentile. *By
bytes*: the ratio of the bytes. *Of the stream*: the mode's bandwidth over that of the machine's stream of 4
reads and 3 in-place writes, measured with it (-: every sample was disturbed).
"""


def report(points: list[Point], machine: Machine, quick: bool) -> str:
    threads = sorted({point.timing.threads for point in points})
    heads = ["mode", "against", "bytes", "by bytes"]
    for count in threads:
        heads += [f"{count} thread{'s' * (count > 1)}", "of the stream"]
    table: list[list[Any]] = [heads, ["---"] * 2 + ["---:"] * (len(heads) - 2)]
    for mode, plain in dict.fromkeys((point.mode, point.plain) for point in points):
        cells = [
            mode.name,
            plain.name,
            f"{mode.bytes:.3g} / {plain.bytes:.3g}",
            f"{plain.bytes / mode.bytes:.2f}",
        ]
        for point in (p for p in points if (p.mode, p.plain) == (mode, plain)):
            low, middle, high = (percentile(point.timing.ratios(), percent) for percent in (20, 50, 80))
            cells += [f"**{middle:.2f}** ({low:.2f} to {high:.2f})", as_percent(point.share)]
        table.append(cells)
    parts = [
        f"# Formats of masters and states on {machine.title}",
        *([QUICK] if quick else []),
        METHOD.format(count=points[0].numel),
        f"CPU {machine.cpu}, {machine.cores} cores; torch {machine.torch}, fusedamp {machine.fusedamp} at "
        f"commit {machine.commit} on its {machine.target} kernels, {machine.date}.",
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"
