"""``--scaling``: cost over the number of tensors, elements and threads."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from rich.console import Console
from rich.progress import track

from .duel import Duel, check_small
from .machine import Machine
from .results import Result, write_csv
from .rows import RIVALS, Row
from .timing import Budget, Limits, alternate, percentile
from .workloads import Shapes, numel

INK = "#222222"
STYLES = {
    "ours": ("fusedamp", "#0072B2", "o"),
    "P1": ("torch fused", "#D55E00", "s"),
    "P2": ("torch foreach", "#009E73", "^"),
}
TENSOR_ELEMENTS = 1_000
THREADS_ELEMENTS = 20_000_000


@dataclass(frozen=True)
class Job:
    curve: str
    x: int
    shapes: Shapes
    threads: int


@dataclass(frozen=True)
class Point:
    job: Job
    result: Result


def plan(quick: bool, cores: int) -> list[Job]:
    most_tensors, most_elements = (2, 5) if quick else (5, 8)
    flat = THREADS_ELEMENTS // (20 if quick else 1)
    tensors = [10**e for e in range(most_tensors + 1)]
    elements = [10**e for e in range(3, most_elements + 1)] + [3 * 10**most_elements]
    return [
        *[Job("tensors", count, [(TENSOR_ELEMENTS,)] * count, 1) for count in tensors],
        *[Job("elements", count, [(count,)], 1) for count in elements],
        *[Job("threads", count, [(flat,)], count) for count in range(1, cores + 1)],
    ]


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all curves; write CSV and chart."""
    rows = [Row("adamw", "scaling", RIVALS[key]) for key in ("P1", "P2")]
    checks = {row: check_small(row, [(1_000,)] * 30) for row in rows}
    jobs = [(row, job) for job in plan(options.quick, machine.cores) for row in rows]
    budget = Budget(30 if options.quick else 300, len(jobs), longest=8)
    points = []
    for row, job in track(jobs, "scaling", console=console):
        duel = Duel(row, job.shapes)
        duel.both()
        limits = Limits(options.samples, budget.share())
        timing = alternate(duel.ours.phase, duel.theirs.phase, duel.refill, None, job.threads, limits)
        points.append(Point(job, Result(row, job.shapes, timing, checks[row], None)))
    name = f"{machine.kind}-scaling" + ("-quick" if options.quick else "")
    records = [
        {"curve": p.job.curve, "x": p.job.x, **p.result.record(machine, options.quick)} for p in points
    ]
    write_csv(out / f"{name}.csv", records)
    draw(points, machine, options.quick, out / f"{name}.png")
    console.print("Written:", f"{out / name}.csv", f"{out / name}.png", soft_wrap=True)
    return 0


def draw(points: list[Point], machine: Machine, quick: bool, path: Path) -> None:
    figure, grid = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
    panels = (
        ("tensors", f"Many tensors of {TENSOR_ELEMENTS:,} elements", "tensors", "ns per tensor, 1 thread"),
        ("elements", "One tensor", "elements", "ns per element, 1 thread"),
        ("threads", "One large tensor", "threads", "elements per ns"),
    )
    for axes, (curve, title, x_label, y_label) in zip(grid, panels, strict=True):
        for side, (name, color, marker) in STYLES.items():
            line = _line([p for p in points if p.job.curve == curve], side)
            if line:
                axes.plot(*zip(*line, strict=True), marker=marker, color=color, label=name, linewidth=1.6)
        axes.set_title(title, fontsize=10.5, color=INK)
        axes.set(xlabel=x_label, ylabel=y_label)
        if curve == "threads":
            axes.set_xticks(sorted({p.job.x for p in points if p.job.curve == curve}))
            axes.set_ylim(bottom=0)
        else:
            axes.set(xscale="log", yscale="log")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].legend(frameon=False, fontsize=9)
    trial = " (quick trial at reduced sizes)" if quick else ""
    figure.suptitle(
        f"AdamW step in FP32 on the CPU: scaling of its cost{trial}", fontsize=13, fontweight="bold"
    )
    figure.supxlabel(f"{machine.title}; torch {machine.torch}; {machine.date}", fontsize=8, color="#666666")
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(points: list[Point], side: str) -> list[tuple[int, float]]:
    """Return median cost by x. Our side is timed with each rival; the points with P1 are used."""
    key, who = ("P1", "ours") if side == "ours" else (side, "theirs")
    line = []
    for point in points:
        result = point.result
        if result.row.rival.key == key and result.timing.clean:
            nanoseconds = percentile(result.timing.seconds(who), 50) * 1e9
            if point.job.curve == "threads":
                line.append((point.job.x, numel(result.shapes) / nanoseconds))
            else:
                line.append((point.job.x, nanoseconds / point.job.x))
    return line
