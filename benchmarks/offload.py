"""``--offload``: a step of Offloaded on the CPU, whose copies are plain ones, against the optimizer itself.

Both sides are fusedamp, on the same shapes. The copies are made by the core that steps, or by a second one as
by a GPU's copy engines; after a backward pass that copied the gradients, or with these copies. On a GPU,
``make evidence`` measures them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from fusedamp import optim
from fusedamp.optim.offload.link import Direction, Done, Link
from fusedamp.optim.state.formats import Storage
from rich.console import Console
from rich.markdown import Markdown

from .machine import Machine
from .results import write_csv
from .timing import Budget, Limits, alternate, percentile

SECONDS, QUICK_SECONDS = 120.0, 10.0
SHAPES, QUICK_SHAPES = [(16_000_000,)] * 4, [(500_000,)] * 4
FORMATS = {
    "FP32 masters and states": Storage(),
    "split masters, FP32 states": Storage(master_weights="split"),
    "split masters, BF16 states": Storage(master_weights="split", state_dtype=torch.bfloat16),
    "split masters, 8-bit states": Storage(master_weights="split", state_dtype="int8"),
}


class _Copied(Done):
    def __init__(self, future: Future[None]) -> None:
        self.wait = future.result


class SecondCore(Link):
    """Copies on a core of their own, as a GPU's copy engines make them, in order per direction."""

    def __init__(self) -> None:
        self._queues = {name: ThreadPoolExecutor(1) for name in ("down", "up")}

    def run(self, direction: Direction, work: Callable[[], None]) -> Done:
        return _Copied(self._queues[direction].submit(work))

    def follow(self, done: Done) -> None:
        done.wait()


class Beside(optim.Offloaded):
    """Offloaded whose copies are made by a second core."""

    def _new_link(self, device: torch.device) -> Link:
        return SecondCore()


@dataclass(frozen=True)
class Way:
    """How a step copies. ``copied``: the backward pass has copied the gradients."""

    name: str
    kind: type[optim.Offloaded]
    copied: bool


WAYS = [
    Way("by the same core, gradients copied before", optim.Offloaded, True),
    Way("by a second core, gradients copied before", Beside, True),
    Way("by a second core, with gradients", Beside, False),
]


def sides(kind: type[optim.Offloaded], shapes: list[tuple[int, ...]], storage: Storage) -> tuple[Any, Any]:
    """Return an offloaded and a plain AdamW of BF16 weights, each with its parameters."""
    made = []
    for offloads in (True, False):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(shape).bfloat16()) for shape in shapes]
        for param in params:
            param.grad = torch.randn(param.shape).bfloat16()
        make = partial(kind, optim.AdamW) if offloads else optim.AdamW
        made.append(make(params, **storage))
    return made[0], made[1]


def before(optimizer: optim.Offloaded, way: Way) -> Callable[[], None]:
    """Return what precedes a sample: one thread for the step, and what a backward pass does at its end."""

    def prepare() -> None:
        torch.set_num_threads(1)
        for group in optimizer.param_groups if way.copied else ():
            for param in group["params"]:
                optimizer._arrive(param)
        for bucket in optimizer._mirror.buckets:
            bucket.land()

    return prepare


def checked(kind: type[optim.Offloaded], storage: Storage) -> None:
    """Raise unless both sides make the same weights."""
    ours, theirs = sides(kind, [(1_000,)] * 3, storage)
    for _ in range(3):
        for optimizer in (ours, theirs):
            optimizer.param_groups[0]["rounding_seed"] = 1
            optimizer.step()
    pairs = zip(ours.param_groups[0]["params"], theirs.param_groups[0]["params"], strict=True)
    if not all(torch.equal(one, other) for one, other in pairs):
        raise AssertionError(f"{storage}: the weights differ from those without offload")


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    shapes = QUICK_SHAPES if options.quick else SHAPES
    budget = Budget(QUICK_SECONDS if options.quick else SECONDS, len(FORMATS) * len(WAYS), 2)
    for name, storage in FORMATS.items():
        for way in WAYS:
            checked(way.kind, storage)
            ours, theirs = sides(way.kind, shapes, storage)
            limits = Limits(options.samples, budget.share())
            # Wall time, as two cores work: the step has one of them on both sides.
            timing = alternate(ours.step, theirs.step, before(ours, way), None, 2, limits)
            ratios = timing.ratios()
            yield dict(
                format=name,
                copies=way.name,
                clock=timing.clock,
                numel=sum(map(sum, shapes)),
                **{f"ratio_p{percent}": percentile(ratios, percent) for percent in (20, 50, 80)},
                ns_per_parameter=percentile(timing.seconds("ours"), 50) * 1e9 / sum(map(sum, shapes)),
                clean=len(timing.clean),
                dropped=timing.dropped,
            )


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    records = list(measure(options))
    name = f"{machine.kind}-offload" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [record | vars(machine) for record in records])
    text = report(records, machine)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    return 0


def report(records: list[dict[str, Any]], machine: Machine) -> str:
    lines = [
        f"# Offload on the CPU alone, on {machine.title}",
        "",
        f"AdamW, BF16, {records[0]['numel']:,} elements in 4 tensors, 1 thread. Speedup: time of a step "
        "without offload over that with offload, measured alternately in one process; median, 20th to 80th "
        "percentile. Copies are those of the CPU's memory, by the core that steps or by a second one; on "
        "a GPU they use the bus.",
        "",
        "| format | copies | speedup | ns per parameter |",
        "|---|---|---:|---:|",
    ]
    for r in records:
        cell = f"**{r['ratio_p50']:.2f}** ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})"
        lines.append(f"| {r['format']} | {r['copies']} | {cell} | {r['ns_per_parameter']:.2f} |")
    return "\n".join(lines) + "\n"
