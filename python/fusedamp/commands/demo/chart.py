"""Plots held-out loss and loss scale, one row per task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fusedamp.commands.demo.report import Outcome
from fusedamp.commands.demo.train import Run

# Okabe and Ito's color-blind-safe palette; line styles encode the same.
COLORS = {"fp32": "#000000", "fp16": "#0072B2", "bf16": "#D55E00"}
DASHES = (0, (5, 2))
TITLES = {"gpt": "Small GPT", "digits": "Conv net on digits"}


def draw(outcomes: list[Outcome], path: Path, subtitle: str) -> None:
    """Write the plot to ``path``."""
    scaled = any(run.scaler.is_enabled() for outcome in outcomes for run in outcome.runs)
    columns = 2 if scaled else 1
    size = (6.6 * columns + 0.6, 3.7 * len(outcomes) + 0.9)
    figure, grid = plt.subplots(len(outcomes), columns, figsize=size, squeeze=False, layout="constrained",
                                gridspec_kw={"width_ratios": (1.15, 1)[:columns]})  # fmt: skip
    for outcome, row in zip(outcomes, grid, strict=True):
        _losses(row[0], outcome)
        if scaled:
            _scales(row[1], outcome)
    figure.suptitle(
        f"16-bit weights need FP32 master weights: fine-tuning in FP32, FP16 and BF16\n{subtitle}",
        fontsize=12,
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axes: Axes, outcome: Outcome) -> None:
    for run in outcome.runs:
        steps, losses, _ = zip(*run.evaluations, strict=True)
        axes.plot(steps, losses, color=COLORS[run.variant.dtype], **_style(run))
    _label_ends(axes, [run for run in outcome.runs if run.variant.stack == "fusedamp"])
    axes.plot([], [], color="#000000", linewidth=5, alpha=0.25, label="torch: FP32, AMP")
    axes.plot([], [], color="#000000", linewidth=1.6, label="fusedamp, FP32 master weights")
    axes.plot([], [], color="#000000", linewidth=1.6, linestyle=DASHES, label="fusedamp, no master weights")
    axes.legend(frameon=False, fontsize=9, loc="lower left")
    axes.set(title=f"{TITLES[outcome.task.name]}: held-out loss", xlabel="step", xlim=(0, outcome.task.steps))
    _tidy(axes)


def _label_ends(axes: Axes, runs: list[Run]) -> None:
    """Label the curves at their right ends; curves that end at the same height share a label."""
    bottom, top = axes.get_ylim()
    bundles: list[list[Run]] = []
    for run in sorted(runs, key=lambda run: run.held_out_loss):
        if bundles and run.held_out_loss - bundles[-1][0].held_out_loss < (top - bottom) * 0.02:
            bundles[-1].append(run)
        else:
            bundles.append([run])
    height = bottom
    for bundle in bundles:
        end = bundle[0].held_out_loss
        height = max(height + (top - bottom) * 0.11, end)
        formats = sorted({run.variant.dtype for run in bundle}, reverse=True)
        bare = [not run.variant.masters for run in bundle]
        masters = "no master weights" if all(bare) else ""
        axes.annotate(
            f"{', '.join(formats).upper()} {end:.3f}\n{masters}".strip(),
            (1.015, height),
            xycoords=("axes fraction", "data"),
            va="center",
            fontsize=9,
            annotation_clip=False,
            color=COLORS[formats[0]] if len(formats) == 1 else "#000000",
        )


def _scales(axes: Axes, outcome: Outcome) -> None:
    for run in outcome.runs:
        if run.scaler.is_enabled() and run.variant.masters:
            name = f"{run.variant.name}: {len(run.skipped)} skipped"
            attempts = range(len(run.scales))
            axes.step(attempts, run.scales, where="post", color=COLORS["fp16"], label=name, **_style(run))
            heights = [run.scales[i] for i in run.skipped]
            axes.plot(run.skipped, heights, "x", color=COLORS["fp32"], markersize=6)
    axes.plot([], [], "x", color=COLORS["fp32"], label="gradients overflowed, step skipped")
    axes.set_yscale("log", base=2)
    axes.set(title=f"{TITLES[outcome.task.name]}: loss scale (FP16)", xlabel="attempt (step done or skipped)")
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _style(run: Run) -> dict[str, Any]:
    if run.variant.stack == "torch":
        return {"linewidth": 5, "alpha": 0.25, "linestyle": "-"}
    return {"linewidth": 1.6, "linestyle": "-" if run.variant.masters else DASHES}


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
