"""The picture: held-out loss and loss scale, one row per task."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from fusedamp.demo.report import Outcome, held_out
from fusedamp.demo.train import Run

# Okabe and Ito's palette, told apart by colour-blind readers; line styles say the same once more.
COLOURS = {"fp32": "#000000", "fp16": "#0072B2", "bf16": "#D55E00"}
TITLES = {"gpt": "Small GPT", "digits": "Conv net on digits"}


def draw(outcomes: list[Outcome], path: Path, subtitle: str) -> None:
    """Write the picture to ``path``."""
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
        f"16-bit weights need FP32 masters: fine-tuning in FP32, FP16 and BF16\n{subtitle}", fontsize=12
    )
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _losses(axes: Axes, outcome: Outcome) -> None:
    for run in outcome.runs:
        steps, losses, _ = zip(*run.evaluations, strict=True)
        axes.plot(steps, losses, color=COLOURS[run.variant.dtype], **_style(run))
    ends = {}  # one label per bundle of curves that end at the same height
    top, bottom = axes.get_ylim()[1], axes.get_ylim()[0]
    for run in sorted((r for r in outcome.runs if r.variant.stack == "fusedamp"), key=held_out):
        label = run.variant.dtype.upper() + (", no masters" if not run.variant.masters else "")
        near = next((y for y in ends if abs(y - held_out(run)) < (top - bottom) * 0.02), held_out(run))
        ends.setdefault(near, []).append((label, COLOURS[run.variant.dtype]))
    for y, members in ends.items():
        text = ", ".join(label for label, _ in members)
        text = f"with masters: {text}" if len(members) > 1 else text
        colour = members[0][1] if len(members) == 1 else "#000000"
        axes.annotate(f"{text}  {y:.3f}", (outcome.task.steps, y), (-4, 5), textcoords="offset points",
                      ha="right", va="bottom", fontsize=9, color=colour)  # fmt: skip
    axes.set(title=f"{TITLES[outcome.task.name]}: held-out loss", xlabel="step", xlim=(0, outcome.task.steps))
    _tidy(axes)


def _scales(axes: Axes, outcome: Outcome) -> None:
    for run in outcome.runs:
        if run.scaler.is_enabled() and run.variant.masters:
            name = f"{run.variant.name}: {len(run.skipped)} skipped"
            attempts = range(len(run.scales))
            axes.step(attempts, run.scales, where="post", color=COLOURS["fp16"], label=name, **_style(run))
            heights = [run.scales[i] for i in run.skipped]
            axes.plot(run.skipped, heights, "x", color=COLOURS["fp32"], markersize=6)
    axes.plot([], [], "x", color=COLOURS["fp32"], label="gradients overflowed, step skipped")
    axes.set_yscale("log", base=2)
    axes.set(title=f"{TITLES[outcome.task.name]}: loss scale (FP16)", xlabel="attempt")
    axes.legend(frameon=False, fontsize=9)
    _tidy(axes)


def _style(run: Run) -> dict[str, object]:
    if run.variant.stack == "torch":
        return {"linewidth": 5, "alpha": 0.25, "linestyle": "-"}
    return {"linewidth": 1.6, "linestyle": "-" if run.variant.masters else (0, (5, 2))}


def _tidy(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
