"""``--cliffs``: inputs for which the same work could cost many times as much.

The gradient check of zeros, tiny values and sparse rows against dense gradients (target: at most 2 for zeros
in cache, 1.3 for 98 % zero rows), a step over many groups against one group, and the first step with 8-bit
states against FP32. Both sides are fusedamp, timed alternately in one process.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

import fusedamp
import fusedamp.optim
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


Step = Callable[[], object]


def gradient_check(content: str, dtype: torch.dtype, rows: int) -> tuple[Step, Step]:
    """Return `grad_stats` of the content, and of dense gradients."""
    torch.manual_seed(0)
    dense = torch.randn(rows, WIDTH) * 1e-3
    tried, dense = CONTENTS[content](dense).to(dtype), dense.to(dtype)
    if content.endswith("zeros") != (not tried.any()):
        raise AssertionError(f"{content} in {dtype} does not match its name")
    return lambda: ops.grad_stats([tried]), lambda: ops.grad_stats([dense])


def steps_of_groups(dtype: torch.dtype) -> tuple[Step, Step]:
    """Return repeated steps over 1,000 tensors of 10 elements in 100 groups, and in one."""
    optimizers = []
    for groups in (100, 1):
        params = [torch.nn.Parameter(torch.ones(10, dtype=dtype)) for _ in range(1000)]
        for param in params:
            param.grad = torch.ones_like(param)
        size = len(params) // groups
        some = [{"params": params[i * size : (i + 1) * size]} for i in range(groups)]
        optimizers.append(fusedamp.optim.AdamW(some))
    return optimizers[0].step, optimizers[1].step


def first_steps(dtype: torch.dtype, numel: int) -> tuple[Step, Step]:
    """Return an optimizer's first step, which creates states, with 8-bit and with FP32 states."""
    param = torch.nn.Parameter(torch.ones(numel, dtype=dtype))
    param.grad = torch.ones_like(param)

    def first(state_dtype: str) -> Step:
        return lambda: fusedamp.optim.AdamW([param], state_dtype=state_dtype).step()

    return first("int8"), first("float32")


def pairs(quick: bool) -> Iterator[tuple[str, torch.dtype, str, int, tuple[Step, Step]]]:
    """Yield the measurements: name, dtype, place, number of elements, tested step and reference step."""
    for dtype in (torch.float32, torch.bfloat16):
        for content in CONTENTS:
            for place, rows in ROWS.items():
                rows = rows // (10 if quick and place == "in memory" else 1)
                yield content, dtype, place, rows * WIDTH, gradient_check(content, dtype, rows)
        yield "step of 100 groups, against one group", dtype, "in cache", 10_000, steps_of_groups(dtype)
        numel = 2**20 if quick else 2**24
        yield (
            "first step with 8-bit states, against FP32",
            dtype,
            "in memory",
            numel,
            first_steps(dtype, numel),
        )


def measure(pair: tuple[Step, Step], threads: int, limits: Limits) -> Timing:
    """Time a pair: `ours` is the tested step, `theirs` the reference."""
    tried, plain = pair
    return alternate(lambda: tried() and None, lambda: plain() and None, lambda: None, None, threads, limits)


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    seconds = QUICK_SECONDS if options.quick else SECONDS
    count = 2 * (len(CONTENTS) * len(ROWS) + 2) * len(options.threads)
    budget, records = Budget(seconds, count, 3), []
    for row, dtype, place, numel, pair in pairs(options.quick):
        for threads in options.threads:
            timing = measure(pair, threads, Limits(options.samples, budget.share()))
            ratios = 1 / timing.ratios()
            records.append(
                dict(
                    row=row,
                    dtype=str(dtype).removeprefix("torch."),
                    place=place,
                    threads=threads,
                    numel=numel,
                    **{f"ratio_p{percent}": percentile(ratios, percent) for percent in (20, 50, 80)},
                    clean=len(timing.clean),
                    dropped=timing.dropped,
                    **vars(machine),
                )
            )
    name = f"{machine.kind}-cliffs" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", records)
    text = report(records, machine)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    return 0


def report(records: list[dict], machine: Machine) -> str:
    lines = [
        f"# Performance cliffs of a step, on {machine.title}",
        "",
        "Numbers are time / time of the reference (gradient checks: a dense tensor of the same size), "
        "measured "
        "alternately in one process: median, and 20th to 80th percentile.",
        "",
        "| row | dtype | where | threads | time / reference |",
        "|---|---|---|---:|---:|",
    ]
    for r in records:
        cell = f"**{r['ratio_p50']:.2f}** ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})"
        lines.append(f"| {r['row']} | {r['dtype']} | {r['place']} | {r['threads']} | {cell} |")
    return "\n".join(lines) + "\n"
