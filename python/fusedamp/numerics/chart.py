"""Draws records with matplotlib: gradients over steps in the range of FP16, or the parameters of one step."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .bins import FLOOR, HIGHEST, HUGE, LARGEST, LOWEST, NORMAL, TINY, bin_of
from .record import Record, share
from .table import shorten

try:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import LogNorm
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import FuncFormatter, MaxNLocator
except ModuleNotFoundError as error:
    raise ImportError(
        "plots of fusedamp.numerics need matplotlib, which is not installed here: "
        'pip install "fusedamp[numerics]"'
    ) from error

WIDTH, DPI = 9.0, 100  # inches; 900 pixels
TALLEST = 20.0  # inches of the rows of parameters
ROW, LABELED = 0.2, 0.14  # inches of a row; the least between two labels
NAME = 42  # characters of a name
JUMP = 0.1  # percentage points of zeros that come or go with the scale, from which they are marked
# Okabe and Ito's color-blind-safe palette; markers and dashes say the same.
BLACK, ORANGE, BLUE, GREEN, RED = "#000000", "#E69F00", "#0072B2", "#009E73", "#D55E00"
NORM, COLORS = LogNorm(1e-3, 100, clip=True), "viridis_r"  # percent of the elements
HALO = [withStroke(linewidth=2.5, foreground="white")]
LIMITS = (  # log2 of FP16's limits, dashes, labels
    (math.log2(LARGEST), "-", "FP16's ceiling,\n65504 / scale"),
    (NORMAL, (0, (5, 2)), "least normal,\n$2^{-14}$ / scale"),
    (FLOOR, (0, (1, 1.5)), "FP16's floor,\n$2^{-24}$ / scale"),
)
SHARES = (
    ("zeros_percent", "o-", BLUE, "zeros"),
    ("subnormal_percent", "s--", ORANGE, "subnormal in FP16"),
    ("lost_updates_percent", "^:", GREEN, "updates lost without masters"),
)


def draw(
    records: Sequence[Record],
    trajectory: Tensor | None,
    path: str | os.PathLike[str],
    step: int | None = None,
) -> None:
    """Write a plot of ``records`` to ``path``, 900 pixels wide.

    Without ``step``: the histogram of all gradients over the steps, with FP16's limits, which move with the
    scale; below it the scale and skipped steps, and zeros, subnormal elements and lost updates in percent.
    Gradients are unscaled. A triangle marks a change of the scale that comes with a change of the zeros:
    that is underflow. With ``step``: the histograms of that step's parameters.

    Args:
        records: one or more, in order of their steps.
        trajectory: FP64 ``[m, 4]``: step, scale, skipped, largest magnitude of the scaled gradients, of each
            step; or None. Steps long before the first record are not drawn.
        path: the file; its suffix is a format that matplotlib writes, such as ``.png`` or ``.svg``.
        step: the step of one of the records.

    Raises: ImportError without matplotlib, ValueError if there is no record, no record of ``step``, no such
    folder or format, or a trajectory of another shape.
    """
    path = _checked(path)
    if not records:
        raise ValueError("[plot] there are no records yet; the first one comes with step `every`")
    if trajectory is not None and (trajectory.dim() != 2 or trajectory.shape[1] != 4):
        raise ValueError(f"[plot] trajectory has shape {list(trajectory.shape)}; expected [m, 4]")
    if step is None:
        _over_steps(records, trajectory).savefig(path, dpi=DPI)
        return
    known = {record.step: record for record in records}
    if step not in known:
        raise ValueError(f"[plot] step is {step}; expected one of {', '.join(map(str, known))}")
    _one_step(known[step]).savefig(path, dpi=DPI)


def draw_run(rows: Sequence[dict[str, float]], path: str | os.PathLike[str]) -> None:
    """Write a plot of a run's records, as ``loggers.read_csv`` returns them: headroom, scale and skips,
    shares.

    Raises: as :func:`draw`.
    """
    path = _checked(path)
    if not rows:
        raise ValueError("[plot] there are no records yet")
    figure: Any = Figure(figsize=(WIDTH, 6.6), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True)
    steps = [row["step"] for row in rows]
    bits = [row["headroom_bits"] if math.isfinite(row["headroom_bits"]) else math.nan for row in rows]
    top.plot(steps, bits, "o-", color=BLUE, markersize=3.5, linewidth=1)
    top.axhline(0, color=BLACK, linewidth=1.2)
    top.annotate("overflow", (1.01, 0), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    top.set_ylabel("least headroom, bits")
    top.set_title(f"{len(rows):,} records, steps {steps[0]:.0f} to {steps[-1]:.0f}", fontsize=11)
    _scale(middle, steps, [row["scale"] for row in rows], [row["skipped"] for row in rows])
    _shares(bottom, steps, rows)
    figure.savefig(path, dpi=DPI)


def jumps(records: Sequence[Record]) -> list[tuple[Record, float]]:
    """Return the records where underflow is seen, each with the change of its zeros in percentage points.

    There the scale differs from the record before, and zeros changed with it: more of them at a smaller
    scale, or fewer at a larger one. At the larger scale enough elements are where the smaller scale would
    flush them; without these, other causes changed the zeros. Skipped steps do not count.
    """
    found = []
    taken = [record for record in records if not record.skipped and record.scale > 0]
    for before, after in pairwise(taken):
        small, large = sorted((before, after), key=lambda record: record.scale)
        flushed = math.ceil(FLOOR + math.log2(large.scale / small.scale))
        total = large.histogram.sum(0)
        most = 100 * share(total[TINY : bin_of(min(flushed, HIGHEST))].sum(), total.sum()).item()
        more = small.summary()["zeros_percent"] - large.summary()["zeros_percent"]
        if small.scale < large.scale and min(more, most) >= JUMP:
            found.append((after, more if after is small else -more))
    return found


def _checked(path: str | os.PathLike[str]) -> Path:
    path = Path(path)
    if not path.parent.is_dir():
        raise ValueError(f"[plot] path is {path}; expected a file in a folder that exists")
    if path.suffix[1:].lower() not in Figure().canvas.get_supported_filetypes():
        raise ValueError(f"[plot] path is {path}; expected a suffix such as .png, .svg or .pdf")
    return path


def _over_steps(records: Sequence[Record], trajectory: Tensor | None) -> Any:
    figure: Any = Figure(figsize=(WIDTH, 8.4), layout="constrained")
    top, middle, bottom = figure.subplots(3, sharex=True, gridspec_kw={"height_ratios": (3.4, 1, 1.2)})
    numbers = [record.step for record in records]
    edges = _edges(numbers)
    for record, left, right in zip(records, edges, edges[1:], strict=False):
        bins, percents = _percents(record.histogram.sum(0, keepdim=True))
        top.pcolormesh([left, right], _binades(record, bins), percents.T, norm=NORM, cmap=COLORS)
    start = 2 * edges[0] - numbers[0]  # where the first record's steps begin
    if trajectory is not None:
        trajectory = trajectory[trajectory[:, 0] >= start]
    if trajectory is None or not len(trajectory):
        trajectory = _trajectory_of(records)
    steps, scales, skipped, largest = trajectory.unbind(1)
    left, right = min(edges[0], *steps.tolist()), max(edges[-1], *steps.tolist())
    _limits(top, steps, _log2(scales), left, right)
    values = (_log2(largest) - _log2(scales)).tolist()
    top.plot(steps.tolist(), values, ".-", color=RED, lw=0.7, ms=2.5, label="largest gradient of each step")
    _mark_underflow(top, records)
    top.set_ylabel("gradients, unscaled: magnitude")
    _powers(top.yaxis)
    low, high = top.get_ylim()
    top.set_ylim(low - 1, high + 0.14 * (high - low))  # room for the legend
    top.legend(loc="upper left", ncols=2, fontsize=8, frameon=False)
    parameters = max(len(record.names) for record in records)
    when = f"step {numbers[0]:,}" if len(records) == 1 else f"steps {numbers[0]:,} to {numbers[-1]:,}"
    figure.suptitle(f"Gradients of {parameters:,} parameter{'s' * (parameters != 1)}, {when}", fontsize=11)
    _color_bar(figure, top, "top", "all elements of the step")
    _scale(middle, steps.tolist(), scales.tolist(), skipped.tolist())
    _shares(bottom, numbers, [record.summary() for record in records])
    top.set_xlim(left, right)
    return figure


def _trajectory_of(records: Sequence[Record]) -> Tensor:
    """Return the trajectory of the records alone."""
    rows = [[r.step, r.scale, r.skipped, max(r.largest.tolist(), default=0.0)] for r in records]
    return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _limits(axes: Any, steps: Tensor, bits: Tensor, left: float, right: float) -> None:
    """Draw FP16's limits at each step's scale, 2^bits."""
    for limit, dashes, label in LIMITS:
        heights = (limit - bits).tolist()
        xs, ys = [left, *steps.tolist(), right], [heights[0], *heights, heights[-1]]
        axes.step(xs, ys, where="mid", color=BLACK, linestyle=dashes, linewidth=1.2, path_effects=HALO)
        end = {"xycoords": ("axes fraction", "data"), "va": "center", "fontsize": 8}
        axes.annotate(label, (1.01, heights[-1]), **end)


def _mark_underflow(axes: Any, records: Sequence[Record]) -> None:
    marked = {"color": ORANGE, "markeredgecolor": BLACK, "linestyle": "", "markersize": 9}
    label = "underflow: zeros changed with the scale"
    for record, change in jumps(records):
        floor = FLOOR - math.log2(record.scale)
        axes.plot(record.step, floor, "^", label=label, **marked)
        side = "right" if record is records[-1] else "center"
        text = {"textcoords": "offset points", "ha": side, "fontsize": 8, "path_effects": HALO}
        axes.annotate(f"{change:+.1f} % zeros", (record.step, floor), (0, -14), **text)
        label = ""


def _one_step(record: Record) -> Any:
    rows = len(record.names)
    height = min(max(ROW * rows, 0.6), TALLEST)
    figure: Any = Figure(figsize=(WIDTH, height + 1.8), layout="constrained")
    axes = figure.subplots()
    bins, percents = _percents(record.histogram)
    if rows:
        axes.pcolormesh(_binades(record, bins), range(rows + 1), percents, norm=NORM, cmap=COLORS)
    for limit, dashes, label in LIMITS:
        at = limit - (math.log2(record.scale) if record.scale else math.nan)
        axes.axvline(at, color=BLACK, linestyle=dashes, linewidth=1.2, path_effects=HALO)
        above = {"textcoords": "offset points", "ha": "center", "fontsize": 8}
        axes.annotate(label, (at, 1.0), (0, 3), xycoords=("data", "axes fraction"), **above)
    labeled = range(0, rows, max(math.ceil(rows * LABELED / height), 1))
    words = {math.inf: "all zero", -math.inf: "overflow"}
    right = axes.twinx()
    bits = record.headroom_bits.tolist()
    names = [shorten(record.names[i], NAME) for i in labeled]
    for side, texts in ((axes, names), (right, [words.get(bits[i], f"{bits[i]:.1f}") for i in labeled])):
        side.set_ylim(max(rows, 1), 0)
        side.set_yticks([i + 0.5 for i in labeled], texts, fontsize=8)
        side.tick_params(axis="y", length=0)
    right.set_ylabel("headroom, bits")
    for i, count in enumerate(record.overflows.tolist()):
        if count:
            axes.plot(0.985, i + 0.5, "X", color=RED, transform=axes.get_yaxis_transform())
    _powers(axes.xaxis)
    axes.set_xlabel("gradients, unscaled: magnitude")
    skipped = ", skipped: inf or NaN where marked ✖" if record.skipped else ""
    figure.suptitle(f"Gradients of step {record.step:,}{skipped}", fontsize=11)
    _color_bar(figure, axes, "bottom", "the parameter's elements")
    return figure


def _scale(axes: Any, steps: Sequence[float], scales: Sequence[float], skipped: Sequence[float]) -> None:
    """Draw the loss scale of ``steps``, with a cross at each skipped one."""
    shown = [math.log2(scale) if scale else math.nan for scale in scales]
    line = {"drawstyle": "steps-mid", "linewidth": 1.2, "markersize": 2}
    axes.plot(steps, shown, ".-", color=BLACK, label="loss scale", **line)
    found = [(step, scale) for step, scale, skip in zip(steps, shown, skipped, strict=True) if skip]
    axes.plot(
        *(zip(*found, strict=True) if found else ([], [])),
        "X",
        color=RED,
        ms=6,
        label=f"{len(found):,} skipped",
    )
    _powers(axes.yaxis, 4)
    axes.set_ylabel("loss scale")
    axes.margins(y=0.25)
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)


def _shares(axes: Any, steps: Sequence[float], rows: Sequence[dict[str, float]]) -> None:
    for name, line, color, label in SHARES:
        values = [row.get(name, math.nan) for row in rows]
        if not all(map(math.isnan, values)):
            axes.plot(steps, values, line, color=color, linewidth=1.2, markersize=4, label=label)
    axes.set(ylim=(-4, 104), ylabel="percent", xlabel="step")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), fontsize=8, frameon=False)
    axes.grid(axis="y", alpha=0.25)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _color_bar(figure: Any, axes: Any, side: str, of: str) -> None:
    colors = ScalarMappable(NORM, COLORS)
    bar = figure.colorbar(colors, ax=axes, location=side, shrink=0.5, aspect=40, pad=0.02)
    bar.set_label(f"percent of {of} (white: none)", fontsize=8)
    bar.ax.tick_params(labelsize=8)


def _powers(axis: Any, ticks: int = 8) -> None:
    """Label whole log2 values as powers of two."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"$2^{{{value:.0f}}}$"))
    axis.set_major_locator(MaxNLocator(ticks, steps=[1, 2, 4, 8, 10], integer=True))


def _percents(histogram: Tensor) -> tuple[slice, Tensor]:
    """Return which of the bins 1..62 have an element, from the first to the last, and the percentages of
    their elements, NaN for none. ``histogram`` is int64 ``[n, 64]``."""
    inner = histogram[:, TINY : HUGE + 1]
    filled = inner.any(0).nonzero().flatten().tolist() or [0]
    bins = slice(filled[0], filled[-1] + 1)
    percents = 100 * share(inner, histogram.sum(1, keepdim=True))
    return bins, percents.masked_fill(inner == 0, math.nan)[:, bins]


def _binades(record: Record, bins: slice) -> list[float]:
    """Return the edges of ``bins`` as log2 of unscaled gradients; the outermost bins are drawn as wide as
    the others."""
    shift = math.log2(record.scale) if record.scale else 0.0
    return [exponent - shift for exponent in range(LOWEST - 1 + bins.start, LOWEST + bins.stop)]


def _edges(steps: Sequence[int]) -> list[float]:
    """Return the left edges of the columns of some steps, and the last right edge."""
    inner = [(a + b) / 2 for a, b in pairwise(steps)]
    left = inner[0] - steps[0] if inner else 2
    right = steps[-1] - inner[-1] if inner else 2
    return [steps[0] - left, *inner, steps[-1] + right]


def _log2(values: Tensor) -> Tensor:
    """Return log2; NaN, which is not drawn, for 0 and inf."""
    return values.log2().masked_fill((values == 0) | ~values.isfinite(), math.nan)
