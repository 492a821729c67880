"""Plots training loss for each loss factor, and for each format of the weights."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .report import Sweep

BLACK, GRAY = "#000000", "#999999"
PALETTE = ("#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442")  # Okabe and Ito's
TOP = 8.0  # largest plotted loss; 256 equally likely bytes have 5.5


def draw(sweeps: list[Sweep], path: Path, subtitle: str) -> None:
    """Write the plot to ``path``."""
    figure, axes = plt.subplots(
        1, len(sweeps), figsize=(6.8 * len(sweeps), 6.0), squeeze=False, layout="constrained"
    )
    for sweep, one in zip(sweeps, axes[0], strict=True):
        _curves(one, sweep)
    figure.suptitle(f"FP16 needs loss scaling and master weights\n{subtitle}", fontsize=12)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _curves(axes: Axes, sweep: Sweep) -> None:
    colors = iter(PALETTE)
    for result in sweep.results:
        steps, losses = zip(*result.curve, strict=True)
        reference = result.setup.dtype == "fp32"
        color = (GRAY if result.setup.order else BLACK) if reference else next(colors)
        bare = result.setup.options.get("master_weights") == "none"
        axes.plot(
            steps,
            losses,
            color=color,
            linewidth=4 if reference else 1.6,
            alpha=0.4 if reference else 1.0,
            linestyle=(0, (5, 2)) if bare else "-",
            label=f"{result.setup.name}: {result.held_out:.3f} held out",
        )
    lowest = min(loss for result in sweep.results for _, loss in result.curve if loss == loss)
    highest = max(loss for result in sweep.results for _, loss in result.curve if loss == loss)
    axes.set(title=sweep.title, xlabel="step", ylabel="training loss", ylim=(lowest - 0.1, min(highest, TOP)))
    axes.legend(frameon=False, fontsize=9, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)
