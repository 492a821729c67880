"""Runs the demo: trains, prints the tables, draws the plot, and reports whether the claim held."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from math import log2

import torch
from rich.console import Console

from fusedamp.commands.demo.chart import draw
from fusedamp.commands.demo.energy import energy_lines
from fusedamp.commands.demo.gradients import gradients_line
from fusedamp.commands.demo.options import Options
from fusedamp.commands.demo.report import Bars, Outcome, table
from fusedamp.commands.demo.tasks import Task, digits_task, gpt_task
from fusedamp.commands.demo.train import EXTRA_ORDERS, finetune, pretrain

QUICK = 3


def run(options: Options) -> int:
    """Run the demo; returns 0, or 1 if a part of the claim was not confirmed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    tasks = [gpt_task(options.data) if name == "gpt" else digits_task() for name in options.tasks]
    return run_tasks([_resized(task, options) for task in tasks], options)


def run_tasks(tasks: list[Task], options: Options) -> int:
    """Train and report on loaded tasks."""
    console = Console(highlight=False)
    started = time.perf_counter()
    console.print(_machine(options), _method(options), sep="\n", end="\n\n")
    outcomes = [_train(task, options, console) for task in tasks]
    for outcome in outcomes:
        lines = outcome.lost_line(), gradients_line(outcome.runs, outcome.task.finetune(options.seed, 0))
        console.print(table(outcome), *filter(None, lines), sep="\n", end="\n\n")
    for outcome in outcomes:
        _show_numerics(outcome, options)
    console.print(
        "Do 16-bit weights match FP32? A gap counts if it is larger than between batch orders of FP32.",
        *(outcome.spread_line() for outcome in outcomes),
        sep="\n",
    )
    findings = [finding for outcome in outcomes for finding in outcome.findings()]
    for finding in findings:
        console.print(
            "yes " if finding.held else "NO  ", finding.text, style="" if finding.held else "bold red"
        )
    draw(outcomes, options.picture, _machine(options))
    console.print(f"\nPlot: {options.picture} (all in {time.perf_counter() - started:.0f} s)", soft_wrap=True)
    if options.energy:
        console.print("", *energy_lines(outcomes[0], options), sep="\n", soft_wrap=True, markup=False)
    failed = sum(not finding.held for finding in findings)
    if failed:
        console.print(
            f"The claim did not hold in {failed} of {len(findings)} points on this run.", style="bold red"
        )
    return 1 if failed else 0


def _resized(task: Task, options: Options) -> Task:
    return replace(task, steps=options.steps or (task.steps // QUICK if options.quick else task.steps))


def _train(task: Task, options: Options, console: Console) -> Outcome:
    bars = Bars(console, task)
    with bars.progress:
        base = pretrain(task, options, on_step=bars.pretrained)
        for runs in finetune(task, base, options):
            bars.finetuned(runs)
    return Outcome(task, runs)


def _show_numerics(outcome: Outcome, options: Options) -> None:
    """Print the table of each watched run, and draw its plot."""
    for run in outcome.runs:
        if run.watch is not None:
            path = options.picture.with_name(f"numerics-{outcome.task.name}.png")
            run.watch.plot(path)
            heading = f"{outcome.task.name}: numerics of {run.variant.name}"
            print(heading, run.watch.table(limit=8), f"Plot: {path}", sep="\n\n", end="\n\n")


def _machine(options: Options) -> str:
    if options.device.type == "cuda":
        name = torch.cuda.get_device_name(options.device)
    else:
        name = f"CPU, threads {torch.get_num_threads()}"
    return (
        f"torch {torch.__version__}, Python {platform.python_version()}, {name}, lr {options.learning_rate:g}"
    )


def _method(options: Options) -> str:
    text = (
        "Fine-tunes two small networks with torch's AMP and with fusedamp, on the same batches, and compares "
        f"held-out losses. At lr {options.learning_rate:g} (BERT's was 2e-5 to 5e-5, arXiv:1810.04805) many "
        "updates are smaller than half the distance between two adjacent 16-bit weights. FP16's loss scale "
        f"starts too large, at 2**{log2(options.init_scale):g}: an overflowing step is skipped, and its "
        f"batch is repeated. Gaps are compared with those of FP32 in {EXTRA_ORDERS} other batch orders. The "
        "networks are too small to time a step: `make bench` does that."
    )
    if options.device.type == "cpu":
        text += " On a CPU, 16-bit layers multiply in FP32 and round the result, as tensor cores do."
    return text
