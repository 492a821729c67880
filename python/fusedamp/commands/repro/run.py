"""Runs the experiments: trains, prints the tables, draws the plot, and reports which claims held."""

from __future__ import annotations

import platform
import time
from functools import partial

import torch
from rich.console import Console
from rich.progress import Progress

from . import parity
from .chart import draw
from .compressed import compressed
from .experiment import Result, Setup, Text, setups, train
from .options import Options
from .report import Sweep, stall_findings, stall_table
from .stalls import stalls

TITLES = ("Loss factors: SGD, FP32 masters", "Weights: AdamW, lr 3e-5")


def run(options: Options) -> int:
    """Run all experiments; returns 0, or 1 if a claim was not confirmed."""
    if options.threads:
        torch.set_num_threads(options.threads)
    console, started = Console(highlight=False), time.perf_counter()
    machine = (
        f"torch {torch.__version__}, Python {platform.python_version()}, threads {torch.get_num_threads()}"
    )
    if options.parity:
        return parity.run(options, machine, console)
    console.print(machine, _METHOD, sep="\n", end="\n\n")
    text = Text()
    with Progress(console=console) as progress:
        sweeps = [
            Sweep(title, _trained(some, text, options, progress))
            for title, some in zip(TITLES, setups(options), strict=True)
        ]
    stopped = [*stalls(options.stall_steps), *compressed(options.stall_steps)]
    for sweep in sweeps:
        console.print(sweep.table(), end="\n\n")
    console.print(stall_table(stopped), end="\n\n")
    findings = [finding for sweep in sweeps for finding in sweep.findings()] + stall_findings(stopped)
    for finding in findings:
        console.print(
            "yes " if finding.held else "NO  ", finding.text, style="" if finding.held else "bold red"
        )
    draw(sweeps, options.picture, machine)
    spent = time.perf_counter() - started
    console.print(f"plot: {options.picture} time: {spent:.0f} s", soft_wrap=True)
    return 0 if all(finding.held for finding in findings) else 1


def _trained(some: list[Setup], text: Text, options: Options, progress: Progress) -> list[Result]:
    results = []
    for setup in some:
        bar = progress.add_task(f"{setup.name:24}", total=options.steps)
        results.append(train(setup, text, options, on_step=partial(progress.advance, bar)))
    return results


_METHOD = (
    "The experiment of Micikevicius et al. 2018 (arXiv:1710.03740) on a character model and Python's "
    "language reference: 16-bit tensors, sums in FP32. A loss factor of 2^-k emulates gradients that are "
    "2^k times smaller; the step divides by it again. Gaps are compared with FP32's spread over batch orders."
)
