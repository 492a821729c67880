"""Reports results: findings, tables and progress bars."""

from __future__ import annotations

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusedamp.commands.demo.tasks import Task
from fusedamp.commands.demo.train import REFERENCE, Run


@dataclass(frozen=True)
class Finding:
    """One statement of the claim with its numbers, and whether it held."""

    text: str
    held: bool


class Outcome:
    """The finished runs of one task, and their comparisons."""

    def __init__(self, task: Task, runs: list[Run]) -> None:
        self.task = task
        self.runs = [run for run in runs if not run.variant.order]
        self.reference = next(run for run in self.runs if run.variant == REFERENCE)
        ends = [
            run.held_out_loss for run in runs if run.variant.stack == "torch" and run.variant.dtype == "fp32"
        ]
        self.spread = max(ends) - min(ends)

    def gap(self, run: Run) -> float:
        """Return the held-out loss minus the FP32 reference's."""
        return run.held_out_loss - self.reference.held_out_loss

    def findings(self) -> list[Finding]:
        """Check the claim. With masters, the gap to FP32 is at most FP32's spread over batch orders; without,
        it is larger."""
        return [self._finding(run) for run in self.runs if run.variant.stack == "fusedamp"]

    def _finding(self, run: Run) -> Finding:
        gap = self.gap(run)
        if run.variant.masters:
            claim, held = "matches FP32", abs(gap) <= self.spread
        else:
            claim, held = "falls behind FP32", gap > self.spread
        verdict = claim if held else f'does not show "{claim}"'
        return Finding(f"{self.task.name}: {run.variant.name} {verdict}: {gap:+.4f}", held)

    def spread_line(self) -> str:
        """Return a line on FP32's own differences, with which gaps are compared."""
        return f"{self.task.name}: other batch orders move FP32's held-out loss by {self.spread:.4f}"

    def lost_line(self) -> str:
        """Return a line on the share of FP32's updates that 16-bit weights would lose."""
        shares = " and ".join(f"{share:.0%} in {name.upper()}" for name, share in self.reference.lost.items())
        return f"Halfway, 16-bit weights without FP32 master weights would lose {shares} of FP32's updates."


def table(outcome: Outcome) -> Table:
    """Build a table with one row per run."""
    grid = Table(
        title=f"{outcome.task.name}: {outcome.task.story}",
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        collapse_padding=True,  # fits 80 columns
        pad_edge=False,
    )
    grid.add_column("run", no_wrap=True)
    heads = (
        "held-out\nloss",
        "minus\nFP32's",
        "accu-\nracy",
        "training\nloss",
        "steps\nskipped",
        "bytes/\nparam",
    )
    for head in heads:
        grid.add_column(head, justify="right", no_wrap=True)
    for run in outcome.runs:
        variant = run.variant
        grid.add_row(
            variant.label + (f"\n  {variant.policy}" if variant.policy != "overflow" else ""),
            f"{run.held_out_loss:.4f}",
            "" if run is outcome.reference else f"{outcome.gap(run):+.4f}",
            f"{run.evaluations[-1][2]:.1%}",
            f"{run.train_loss:.4f}",
            f"{len(run.skipped)}",
            f"{run.bytes_per_param:.1f}",
        )
    return grid


class Bars:
    """Progress bars: one for pre-training, then one per run with its latest loss and scale."""

    def __init__(self, console: Console, task: Task) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(6),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, TextColumn("{task.fields[note]}"), console=console)
        self._task = task
        self._pretraining = self._add("pre-training in FP32", task.pretrain_steps)
        self._rows: dict[str, TaskID] = {}

    def _add(self, name: str, steps: int) -> TaskID:
        return self.progress.add_task(f"{self._task.name:6} {name}", total=steps, note="")

    def pretrained(self) -> None:
        """Advance after one step of pre-training."""
        self.progress.advance(self._pretraining)

    def finetuned(self, runs: list[Run]) -> None:
        """Advance after one step of every run."""
        for run in runs:
            name = run.variant.label
            if name not in self._rows:
                self._rows[name] = self._add(name, self._task.steps)
            scale = f"  scale {run.scales[-1]:.0f}" if run.scaler.is_enabled() else ""
            self.progress.update(self._rows[name], advance=1, note=f"loss {run.losses[-1]:.3f}{scale}")
