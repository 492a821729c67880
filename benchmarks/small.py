"""``--small``: host time of a step over tensors that are too small for kernel time to matter.

Speedup over torch's fused AdamW with its scaler and clipping, measured alternately in one process, for 1, 4
and 2,000 tensors of 10 elements. Each row has the number of operations of both sides.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fusedamp
import fusedamp.optim
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch.profiler import ProfilerActivity, profile

from .machine import Machine
from .results import write_csv
from .timing import Budget, Limits, alternate, percentile

SECONDS, QUICK_SECONDS = 60.0, 10.0
COUNTS = (1, 4, 2_000)
NUMEL = 10
PHASES = ("plain step", "with scaler", "with scaler and clipping")
CALLS = 100  # steps of one tensor per sample: the clock is too coarse for one
ALLOCATIONS = {"aten::new_empty", "aten::empty", "aten::empty_strided"}

Phase = Callable[[], None]


def phase_of(ours: bool, count: int, phase: str) -> Phase:
    """Return one iteration after backward, with unchanged gradients."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(NUMEL)) for _ in range(count)]
    for param in params:
        param.grad = torch.randn(NUMEL) * 2.0**16
    optimizer: Any = fusedamp.optim.AdamW(params) if ours else torch.optim.AdamW(params, fused=True)
    if phase == "plain step":
        return lambda: optimizer.step() and None
    scaler: Any = (fusedamp if ours else torch.amp).GradScaler("cpu")
    scaler.scale(torch.zeros(()))

    def iterate() -> None:
        if phase.endswith("clipping"):
            if ours:
                scaler.clip_grad_norm_(optimizer, 1.0)
            else:
                scaler.unscale_(optimizer)
                torch.nn.utils.clip_grad_norm_(params, 1.0)
        scaler.step(optimizer)
        scaler.update()

    return iterate


def operations(phase: Phase) -> int:
    """Count the operations of torch and fusedamp, without allocations of results."""
    for _ in range(4):
        phase()
    with profile(activities=[ProfilerActivity.CPU]) as seen:
        phase()
    names = [event.name for event in seen.events()]
    return sum(name.startswith(("aten::", "fusedamp::")) and name not in ALLOCATIONS for name in names)


def repeated(phase: Phase, times: int) -> Phase:
    def run() -> None:
        for _ in range(times):
            phase()

    return run


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    budget = Budget(QUICK_SECONDS if options.quick else SECONDS, len(COUNTS) * len(PHASES), 1)
    for count in COUNTS:
        for phase in PHASES:
            ours, theirs = (phase_of(mine, count, phase) for mine in (True, False))
            counted = operations(ours), operations(theirs)
            times = max(1, CALLS // count)
            limits = Limits(options.samples, budget.share())
            timing = alternate(repeated(ours, times), repeated(theirs, times), lambda: None, None, 1, limits)
            ratios = timing.ratios()
            seconds = timing.seconds("ours") / times / count
            yield dict(
                tensors=count,
                phase=phase,
                **{f"ratio_p{percent}": percentile(ratios, percent) for percent in (20, 50, 80)},
                microseconds_per_tensor=percentile(seconds, 50) * 1e6,
                operations=counted[0],
                operations_of_torch=counted[1],
                clean=len(timing.clean),
                dropped=timing.dropped,
            )


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    records = list(measure(options))
    name = f"{machine.kind}-small" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [record | vars(machine) for record in records])
    text = report(records, machine)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    return 0


def report(records: list[dict[str, Any]], machine: Machine) -> str:
    lines = [
        f"# Steps over small tensors, on {machine.title}, 1 thread",
        "",
        f"AdamW, FP32, tensors of {NUMEL} elements. Speedup: time of torch's fused AdamW (with its scaler "
        "and its clipping) over ours, measured alternately in one process; median, 20th to 80th percentile. "
        "Operations: calls of torch's dispatcher in one iteration, without allocations; ours, and torch's.",
        "",
        "| tensors | iteration | speedup | operations: ours, torch's | ours, microseconds per tensor |",
        "|---:|---|---:|---:|---:|",
    ]
    for r in records:
        cell = f"**{r['ratio_p50']:.2f}** ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})"
        lines.append(
            f"| {r['tensors']:,} | {r['phase']} | {cell} | {r['operations']}, {r['operations_of_torch']} | "
            f"{r['microseconds_per_tensor']:.2f} |"
        )
    return "\n".join(lines) + "\n"
