"""``--zeros``: the gradient check of zeros, tiny values and sparse rows against that of dense gradients.

Both sides are fusedamp's `grad_stats` on tensors of one size and dtype, in cache and in memory, timed
alternately in one process. At most 2 for zeros in cache and 1.3 for 98 % zero rows is what is wanted.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from fusedamp import ops
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor

from .machine import Machine
from .results import write_csv
from .timing import Budget, Limits, Timing, alternate, percentile

SECONDS, QUICK_SECONDS = 60.0, 10.0
WIDTH = 768  # of a row: GPT-2 small's embedding
ROWS = {"in cache": 256, "in memory": 50_257}  # quick: a tenth of the latter
CONTENTS: dict[str, Callable[[Tensor], Tensor]] = {
    "gradient check of zeros": torch.zeros_like,
    "gradient check of values around 1e-30": lambda dense: dense * 1e-27,
    "gradient check of 98 % zero rows": lambda dense: dense * (torch.rand(len(dense), 1) >= 0.98),
}


def measure(content: str, dtype: torch.dtype, rows: int, threads: int, limits: Limits) -> Timing:
    """`ours` is the content, `theirs` the dense tensor."""
    torch.manual_seed(0)
    dense = torch.randn(rows, WIDTH) * 1e-3
    tried, dense = CONTENTS[content](dense).to(dtype), dense.to(dtype)
    if content.endswith("zeros") != (not tried.any()):
        raise AssertionError(f"{content} in {dtype} is not what it is called")
    return alternate(
        lambda: ops.grad_stats([tried]) and None,  # type: ignore[arg-type, return-value]
        lambda: ops.grad_stats([dense]) and None,  # type: ignore[arg-type, return-value]
        lambda: None,
        None,
        threads,
        limits,
    )


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    jobs = [
        (content, dtype, place)
        for content in CONTENTS
        for dtype in (torch.float32, torch.bfloat16)
        for place in ROWS
    ]
    seconds = QUICK_SECONDS if options.quick else SECONDS
    budget, records = Budget(seconds, len(jobs) * len(options.threads), 3), []
    for content, dtype, place in jobs:
        rows = ROWS[place] // (10 if options.quick and place == "in memory" else 1)
        for threads in options.threads:
            timing = measure(content, dtype, rows, threads, Limits(options.samples, budget.share()))
            ratios = 1 / timing.ratios()
            records.append(
                dict(
                    row=content,
                    dtype=str(dtype).removeprefix("torch."),
                    place=place,
                    threads=threads,
                    numel=rows * WIDTH,
                    **{f"ratio_p{percent}": percentile(ratios, percent) for percent in (20, 50, 80)},
                    clean=len(timing.clean),
                    dropped=timing.dropped,
                    **vars(machine),
                )
            )
    name = f"{machine.kind}-zeros" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", records)
    text = report(records, machine)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    return 0


def report(records: list[dict], machine: Machine) -> str:
    lines = [
        f"# Gradient check of zeros on {machine.title}",
        "",
        "Time over that of a dense tensor of the same size, measured alternately in one process: median, and "
        "20th to 80th percentile.",
        "",
        "| content | dtype | where | threads | time / dense |",
        "|---|---|---|---:|---:|",
    ]
    for r in records:
        cell = f"**{r['ratio_p50']:.2f}** ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})"
        lines.append(f"| {r['row']} | {r['dtype']} | {r['place']} | {r['threads']} | {cell} |")
    return "\n".join(lines) + "\n"
