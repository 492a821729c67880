"""The demo from first line to last: train, show the table, draw the picture, say whether the claim held."""

from __future__ import annotations

import platform
import time
from dataclasses import replace
from math import log2

import torch
from rich.console import Console

from fusedamp.demo.chart import draw
from fusedamp.demo.options import Options
from fusedamp.demo.report import Bars, Outcome, new_progress, table
from fusedamp.demo.tasks import Task, digits_task, gpt_task
from fusedamp.demo.train import EXTRA_ORDERS, finetune, pretrain

QUICK = 3


def run(options: Options) -> int:
    """Run the demo; returns 0, or 1 where a part of the claim did not show."""
    console = Console(highlight=False)
    if options.threads:
        torch.set_num_threads(options.threads)
    started = time.perf_counter()
    where = _device_line(options)
    console.print(where)
    console.print(_method(options), end="\n\n")
    tasks = [
        _resized(gpt_task(options.data) if name == "gpt" else digits_task(), options)
        for name in options.tasks
    ]
    outcomes = [_train(task, options, console) for task in tasks]
    for outcome in outcomes:
        console.print(table(outcome), _lost_line(outcome), sep="\n", end="\n\n")
    findings = [finding for outcome in outcomes for finding in outcome.findings()]
    for finding in findings:
        console.print(
            f"{'yes' if finding.held else 'NO '}  {finding.text}", style=None if finding.held else "bold red"
        )
    draw(outcomes, options.picture, where)
    console.print(f"picture: {options.picture}    time: {time.perf_counter() - started:.0f} s")
    failed = [finding for finding in findings if not finding.held]
    if failed:
        console.print(
            f"The claim did not hold in {len(failed)} of {len(findings)} points on this run.",
            style="bold red",
        )
    return 1 if failed else 0


def _resized(task: Task, options: Options) -> Task:
    steps = options.steps or (task.steps // QUICK if options.quick else task.steps)
    return replace(task, steps=steps)


def _train(task: Task, options: Options, console: Console) -> Outcome:
    with new_progress(console=console) as progress:
        row = progress.add_task(f"{task.name}  pre-training in FP32", total=task.pretrain_steps, note="")
        base = pretrain(task, options, lambda: progress.advance(row))
        bars = None
        for runs in finetune(task, base, options):
            bars = bars or Bars(progress, task, runs)
            bars.advance()
    return Outcome(task, runs)


def _lost_line(outcome: Outcome) -> str:
    shares = " and ".join(f"{share:.0%} in {name.upper()}" for name, share in outcome.reference.lost.items())
    return f"Halfway, weights without masters would round away {shares} of FP32's updates."


def _device_line(options: Options) -> str:
    name = "CPU" if options.device.type == "cpu" else torch.cuda.get_device_name(options.device)
    threads = f", {torch.get_num_threads()} threads" if options.device.type == "cpu" else ""
    return f"torch {torch.__version__}, Python {platform.python_version()}, {name}{threads}, lr {options.learning_rate:g}"


def _method(options: Options) -> str:
    scale = f"2**{log2(options.init_scale):g}"
    text = (
        f"Fine-tuning at lr {options.learning_rate:g}; BERT's was 2e-5 to 5e-5 (arXiv:1810.04805). At such rates many updates are"
        f" smaller than half the distance between two neighbouring 16-bit weights. FP16 starts at loss scale {scale}, too large on"
        " purpose: an overflowing step is skipped and its batch tried again, so all runs make the same updates on the same batches."
        f' The yardstick for "matches" is FP32 itself on {EXTRA_ORDERS} other orders of the batches.'
    )
    if options.device.type == "cpu":
        text += " On a CPU, 16-bit layers multiply in FP32 and round the result, in both stacks; tensor cores do the same."
    return text
