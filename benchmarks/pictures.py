"""Draws the pictures of README.md and docs/ from committed results.

python benchmarks/pictures.py [--out FOLDER]

Each PNG file stores a hash of the numbers that it shows, so that a test finds a picture that is out of date.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pages
from matplotlib.axes import Axes

OURS, THEIRS, LIGHT, WARM, INK = "#0072B2", "#999999", "#56B4E9", "#D55E00", "#222222"
KEYWORD = "Numbers"  # of the hash in the PNG file
GPU = "NVIDIA H200, torch 2.11"


# Numbers: what a picture shows, as plain values ------------------------------------------------


def step_h200() -> Any:
    runs = {run["recipe"]: run for run in pages.evidence()["training"]["runs"]}
    return [
        (title, round(runs[name]["step_ms"], 2), round(runs[name]["optimizer_phase_ms"], 2))
        for name, title in pages.RECIPES.items()
    ]


def _speedups(lines: list[str]) -> Any:
    """Return workloads and rows of a table of speedups, of one thread if there are two numbers."""
    table = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [
        table[0][1:],
        [(row[0].replace("`", ""), [c.split(" ")[0] for c in row[1:]]) for row in table[2:]],
    ]


def speed_h200() -> Any:
    return _speedups(pages.speed_on_the_gpu().splitlines())


def speed_cpu() -> Any:
    return _speedups(pages.speed_on_the_cpu().splitlines())


def memory() -> Any:
    lines = pages.bytes_per_parameter().splitlines()[2:]
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(title.replace("`", ""), [float(number) for number in numbers]) for title, *numbers in table]


def loss_gap() -> Any:
    found = re.findall(
        r"^\| (F.*|B.*) \| ([\d.]+) \| ([-+.\d]+) \| (\S+) to (\S+) \|", pages.PARITY.read_text(), re.M
    )
    return [(name, *map(float, numbers)) for name, *numbers in found]


# Pictures -------------------------------------------------------------------------------------


def _axes(width: float, height: float) -> tuple[plt.Figure, Axes]:
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=9.5, colors=INK)
    return figure, axes


def _title(axes: Axes, title: str, note: str) -> None:
    axes.set_title(title, fontsize=12.5, fontweight="bold", color=INK, loc="left", pad=10)
    axes.annotate(note, (1, 0), (0, -30), xycoords="axes fraction", textcoords="offset points", ha="right",
                  va="top", fontsize=8, color="#666666")  # fmt: skip


def draw_step_h200(numbers: Any) -> plt.Figure:
    figure, axes = _axes(8.6, 3.3)
    for y, (title, step, optimizer) in enumerate(numbers):
        ours = title.startswith("fusedamp")
        axes.barh(y, step - optimizer, 0.62, color=LIGHT if ours else "#CCCCCC")
        axes.barh(y, optimizer, 0.62, left=step - optimizer, color=OURS if ours else "#666666")
        axes.annotate(f"{step:.1f} ms", (step, y), (5, 0), textcoords="offset points", va="center",
                      fontsize=10, fontweight="bold" if ours else "normal", color=INK)  # fmt: skip
    axes.set_yticks(range(len(numbers)), [title for title, *_ in numbers])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.13 * max(step for _, step, _ in numbers))
    axes.set_xlabel("one training step, ms; dark: its optimizer step", fontsize=9.5, color=INK)
    _title(axes, "GPT-2 small, 8 x 1,024 tokens: time of a training step", GPU)
    return figure


def draw_speed(numbers: Any, where: str) -> plt.Figure:
    workloads, series = numbers
    figure, axes = _axes(8.6, 4)
    step = 0.81 / len(series)
    for place, (title, cells) in enumerate(series):
        color = (OURS, LIGHT, "#009E73", "#E69F00", THEIRS)[place]
        for x, cell in enumerate(cells):
            if cell != "-":
                at = x + (place - (len(series) - 1) / 2) * step
                axes.bar(at, float(cell), 0.93 * step, color=color, label=title if x == 0 else None)
                axes.annotate(
                    cell, (at, float(cell)), (0, 2), textcoords="offset points", ha="center", fontsize=9
                )
    axes.axhline(1, color=INK, linewidth=1, linestyle=(0, (4, 3)))
    axes.set_xticks(range(len(workloads)), workloads)
    axes.set_ylabel("torch time / fusedamp time", fontsize=9.5, color=INK)
    figure.legend(loc="outside lower left", ncols=3, frameon=False, fontsize=9, alignment="left",
                  title="fusedamp against torch's AdamW:", title_fontsize=9)  # fmt: skip
    _title(axes, "Speedup of the AdamW step (with unscaling and clipping)", where)
    return figure


def draw_speed_h200(numbers: Any) -> plt.Figure:
    return draw_speed(numbers, GPU)


def draw_speed_cpu(numbers: Any) -> plt.Figure:
    return draw_speed(numbers, "AMD EPYC, 1 thread, torch 2.13")


def draw_memory(numbers: Any) -> plt.Figure:
    figure, axes = _axes(8.6, 3.6)
    parts = ("weights", "gradients", "master weights", "optimizer states")
    for y, (_, values) in enumerate(numbers):
        left = 0.0
        for part, value, color in zip(parts, values, ("#666666", "#BBBBBB", LIGHT, OURS), strict=False):
            axes.barh(y, value, 0.62, left=left, color=color, label=part if y == 0 else None)
            left += value
        gigabytes = f"{7 * values[-1]:.0f} GB"
        axes.annotate(f"{values[-1]:.4g} bytes, {gigabytes}", (left, y), (5, 0), textcoords="offset points",
                      va="center", fontsize=9.5, color=INK)  # fmt: skip
    titles = [title.replace(", stochastic_rounding", ",\nstochastic_rounding") for title, _ in numbers]
    axes.set_yticks(
        range(len(numbers)), ["torch AMP, FP32 weights" if y == 0 else t for y, t in enumerate(titles)]
    )
    axes.invert_yaxis()
    axes.set_xlim(0, 20.5)
    axes.set_xlabel("bytes per parameter; GB of a model of 7 * 10^9 parameters", fontsize=9.5, color=INK)
    figure.legend(loc="outside lower left", ncols=4, frameon=False, fontsize=9)
    _title(axes, "AdamW with BF16 weights: memory between two steps", "")
    return figure


def draw_loss_gap(numbers: Any) -> plt.Figure:
    figure, axes = _axes(8.6, 3.6)
    for name, size, mean, low, high in numbers:
        lost = "no masters" in name and "stochastic" not in name
        color = WARM if lost else OURS
        marker = {"FP32": "s", "FP16": "o", "BF16": "^"}[name[:4]]
        axes.plot([size, size], [low, high], color=color, linewidth=1.2, alpha=0.7)
        axes.plot(size, mean, marker, color=color, markersize=7, markeredgecolor="white")
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xlabel("bytes per parameter", fontsize=9.5, color=INK)
    axes.set_ylabel("held-out loss minus FP32's", fontsize=9.5, color=INK)
    for marker, label, color in (
        ("s", "FP32 weights", OURS),
        ("o", "FP16 weights", OURS),
        ("^", "BF16 weights", OURS),
        ("D", "rounded to nearest, no master weights", WARM),
    ):
        axes.plot([], [], marker, color=color, label=label, markersize=7, markeredgecolor="white")
    axes.set_xlim(5.6, 18.5)
    axes.legend(frameon=False, fontsize=9, loc="upper right")
    _title(
        axes,
        "27 formats of weights, master weights and states",
        "demo GPT, 120 steps, 3 seeds, CPU, torch 2.13",
    )
    return figure


PICTURES: dict[str, tuple[Callable[[], Any], Callable[[Any], plt.Figure]]] = {
    "step_h200": (step_h200, draw_step_h200),
    "speed_h200": (speed_h200, draw_speed_h200),
    "speed_cpu": (speed_cpu, draw_speed_cpu),
    "memory": (memory, draw_memory),
    "loss_gap": (loss_gap, draw_loss_gap),
}


def fingerprint(numbers: Any) -> str:
    return hashlib.sha256(json.dumps(numbers).encode()).hexdigest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=pages.ROOT / "docs")
    folder = parser.parse_args().out
    for name, (read, draw) in PICTURES.items():
        numbers = read()
        figure = draw(numbers)
        figure.savefig(folder / f"{name}.png", dpi=140, metadata={KEYWORD: fingerprint(numbers)})
        plt.close(figure)
        print(folder / f"{name}.png")


if __name__ == "__main__":
    main()
