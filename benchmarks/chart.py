"""The chart for the README: speedup over each rival, one panel per workload."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from .machine import Machine
from .results import Result
from .workloads import WORKLOADS

# Okabe and Ito's color-blind-safe palette.
OURS, MORE_THREADS, SLOWER, INK = "#0072B2", "#56B4E9", "#D55E00", "#222222"
PANELS = ("W1", "W2", "W3")
BAR = 0.36


def draw(results: list[Result], machine: Machine, quick: bool, path: Path) -> list[Path]:
    """Draw AdamW's rows for W1 to W3. Returns the files written; none without data."""
    shown = [result for result in results if result.row.optimizer == "adamw" and result.timing.clean]
    panels = [name for name in PANELS if any(result.row.workload == name for result in shown)]
    if not panels:
        return []
    rivals = sorted(
        {(r.row.rival.key, r.row.rival.title, r.row.dtype) for r in shown if r.row.workload in panels}
    )
    threads = sorted({result.timing.threads for result in shown})
    height = 1.9 + 0.62 * len(rivals)
    figure, grid = plt.subplots(
        1,
        len(panels),
        figsize=(1.9 + 3.1 * len(panels), height),
        squeeze=False,
        sharey=True,
        layout="constrained",
    )
    for axes, name in zip(grid[0], panels, strict=True):
        _panel(axes, [r for r in shown if r.row.workload == name], [key for key, _, _ in rivals], threads)
        axes.set_title(_title(name, shown), fontsize=10.5, color=INK)
    labels = [f"{title}\n{dtype.upper()} weights" for _, title, dtype in rivals]
    grid[0][0].set_yticks(range(len(rivals)), labels, fontsize=9.5, color=INK)
    grid[0][0].invert_yaxis()
    _words(figure, machine, quick, threads, any(r.verdict == "slower" for r in shown))
    figure.savefig(path, dpi=140)
    plt.close(figure)
    return [path]


def _panel(axes: Axes, results: list[Result], rivals: list[str], threads: list[int]) -> None:
    top = max(result.ratio(80) for result in results)
    for result in results:
        place = threads.index(result.timing.threads)
        y = rivals.index(result.row.rival.key) + (place - (len(threads) - 1) / 2) * BAR
        ratio, low, high = result.ratio(), result.ratio(20), result.ratio(80)
        axes.barh(y, ratio, BAR * 0.92, color=SLOWER if result.verdict == "slower" else _color(place))
        axes.plot([low, high], [y, y], color=INK, linewidth=1.1, solid_capstyle="butt")
        text = _times(ratio)
        axes.annotate(text, (max(ratio, high), y), (4, 0), textcoords="offset points", va="center", color=INK,
                      fontsize=9 if place else 9.5, fontweight="normal" if place else "bold")  # fmt: skip
    axes.axvline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xlim(0, top * 1.2)
    axes.set_xticks(np.arange(0, top, 1 if top < 5 else 2 if top < 10 else 5 if top < 30 else 10))
    axes.set_axisbelow(True)
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(left=False, labelsize=9, colors=INK)


def _times(ratio: float) -> str:
    digits = 2 if ratio < 1.1 else 1 if ratio < 10 else 0  # 0.96 is not 1.0
    return f"{ratio:.{digits}f}x"


def _color(place: int) -> str:
    return OURS if place == 0 else MORE_THREADS


def _title(name: str, results: list[Result]) -> str:
    shapes = next(result.shapes for result in results if result.row.workload == name)
    million = sum(int(np.prod(shape)) for shape in shapes) / 1e6
    story = WORKLOADS[name].story if WORKLOADS[name].full == shapes else WORKLOADS[name].story + ", reduced"
    return f"{story[0].upper()}{story[1:]}\n{million:.3g} million elements"


def _words(figure: plt.Figure, machine: Machine, quick: bool, threads: list[int], slower: bool) -> None:
    trial = "QUICK TRIAL AT REDUCED SIZES, NOT A RESULT. " if quick else ""
    figure.suptitle(
        "AdamW step on the CPU: speedup of fusedamp over PyTorch\n",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    figure.text(
        0.5, 0.925, f"{trial}Unscale, overflow check, clip, step, scale update. Dashed: 1. "
        "Lines: 20th to 80th percentile.", ha="center", va="center", fontsize=9, color=INK,
    )  # fmt: skip
    names = ["1 thread (CPU time)" if n == 1 else f"{n} threads (wall time)" for n in threads]
    handles = [Patch(color=_color(place), label=name) for place, name in enumerate(names)]
    if slower:
        handles.append(Patch(color=SLOWER, label="fusedamp slower"))
    figure.legend(handles=handles, loc="outside lower left", ncols=len(handles), frameon=False, fontsize=9)
    figure.text(
        0.995, 0.012, f"{machine.title}; torch {machine.torch}; {machine.date}", ha="right", va="bottom",
        fontsize=8, color="#666666",
    )  # fmt: skip
