"""``--numerics``: an iteration with a watch against one without, on one thread.

Both sides are fusedamp's AdamW with masters, on the same gradients. Measured are steps that are not due and
steps that are; what a watch costs in the mean over its cadence follows from both.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from fusedamp import GradScaler, numerics, optim
from fusedamp.ops.observers import observe, stop_observing
from rich.console import Console
from rich.markdown import Markdown

from .machine import Machine
from .results import write_csv
from .timing import Budget, Limits, alternate, percentile
from .workloads import WORKLOADS, Shapes, numel

SECONDS, QUICK_SECONDS = 300.0, 10.0
NEVER = 10**9
STEPS = {  # what is measured: the arguments of the watch
    "not due": dict(every=NEVER),
    "due, without updates": dict(every=1, updates=False),
    "due": dict(every=1),
}
CADENCES = (("due", 50), ("due, without updates", 100))


class Setting(NamedTuple):
    workload: str
    dtype: torch.dtype
    scales: bool

    def __str__(self) -> str:
        scaler = "scaler" if self.scales else "no scaler"
        return f"{self.workload}, {str(self.dtype).removeprefix('torch.b').removeprefix('torch.')}, {scaler}"


SETTINGS = [
    Setting(workload, dtype, scales)
    for workload in ("W1", "W3")
    for dtype, scales in ((torch.float16, True), (torch.bfloat16, True), (torch.bfloat16, False))
]


def sides(setting: Setting, shapes: Shapes, options: dict[str, Any]) -> tuple[Callable[[], None], ...]:
    """Return an iteration after the backward pass, with and without a watch: gradient check, step and the
    scale's update. Both are of one optimizer, so that they use the same memory."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(s, generator=generator).to(setting.dtype)) for s in shapes]
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator) * 1e-3).to(setting.dtype)
    optimizer = optim.AdamW(params, lr=1e-4)
    scaler = GradScaler("cpu", init_scale=1.0, growth_interval=NEVER) if setting.scales else None
    watch = numerics.watch(optimizer, scaler, history=1, **options)

    def iterate() -> None:
        if scaler is None:
            optimizer.step()
        else:
            scaler.step(optimizer)
            scaler.update()

    def watched() -> None:
        observe(optimizer, watch)
        iterate()

    def plain() -> None:
        stop_observing(optimizer, watch)
        iterate()

    if scaler is not None:
        scaler.scale(torch.ones(()))
    return watched, plain


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    budget = Budget(QUICK_SECONDS if options.quick else SECONDS, len(SETTINGS) * len(STEPS), 12)
    for setting in SETTINGS:
        shapes = WORKLOADS[setting.workload].shapes(options.quick)
        for name, watch in STEPS.items():
            ours, theirs = sides(setting, shapes, watch)
            limits = Limits(options.samples, budget.share())
            timing = alternate(ours, theirs, lambda: torch.set_num_threads(1), None, 1, limits)
            costs = 1 / timing.ratios()
            yield dict(
                workload=setting.workload,
                dtype=str(setting.dtype).removeprefix("torch."),
                scaler=setting.scales,
                step=name,
                clock=timing.clock,
                numel=numel(shapes),
                tensors=len(shapes),
                **{f"cost_p{percent}": percentile(costs, percent) for percent in (20, 50, 80)},
                ns_per_parameter=percentile(timing.seconds("theirs"), 50) * 1e9 / numel(shapes),
                clean=len(timing.clean),
                dropped=timing.dropped,
            )


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    records = list(measure(options))
    name = f"{machine.kind}-numerics" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [record | vars(machine) for record in records])
    text = report(records, machine)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    return 0


def mean_cost(records: list[dict[str, Any]], like: dict[str, Any], step: str, every: int) -> float:
    """Return the time of an iteration with a watch over that without, in the mean over ``every`` steps."""
    same = ("workload", "dtype", "scaler")
    cost = {r["step"]: r["cost_p50"] for r in records if all(r[key] == like[key] for key in same)}
    return float(((every - 1) * cost["not due"] + cost[step]) / every)


def report(records: list[dict[str, Any]], machine: Machine) -> str:
    lines = [
        f"# Cost of a watch, on {machine.title}",
        "",
        "AdamW with FP32 masters, 1 thread: time of gradient check, step and update of the scale with a "
        "watch over that without, measured alternately in one process; median, 20th to 80th percentile. "
        "Without a scaler there is no gradient check, and a watch reads gradients in due steps only. The "
        "last columns follow from the others.",
        "",
        "| workload | weights | scaler | not due | due, without updates | due | every=100, updates=False | "
        "every=50 |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for first in records:
        if first["step"] != "not due":
            continue
        same = [r for r in records if all(r[k] == first[k] for k in ("workload", "dtype", "scaler"))]
        by_step = {r["step"]: r for r in same}
        cells = [
            f"{r['cost_p50']:.2f} ({r['cost_p20']:.2f} to {r['cost_p80']:.2f})"
            for r in (by_step[name] for name in STEPS)
        ]
        means = [f"**{mean_cost(records, first, step, every):.3f}**" for step, every in reversed(CADENCES)]
        scaler = "yes" if first["scaler"] else "no"
        title = f"{first['workload']}, {WORKLOADS[first['workload']].story}"
        lines.append("| " + " | ".join([title, first["dtype"], scaler, *cells, *means]) + " |")
    return "\n".join(lines) + "\n"
