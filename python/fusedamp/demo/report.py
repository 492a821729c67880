"""What the runs say: the claim and whether it held, the table, the progress bars."""

from __future__ import annotations

from dataclasses import dataclass

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from fusedamp.demo.tasks import Task
from fusedamp.demo.train import REFERENCE, Run, phase_ratio


@dataclass(frozen=True)
class Finding:
    """One sentence of the claim, with its figures."""

    text: str
    held: bool


class Outcome:
    """The finished runs of one task, and what is compared with what."""

    def __init__(self, task: Task, runs: list[Run]) -> None:
        self.task = task
        self.orders = [run for run in runs if run.variant.order]
        self.runs = [run for run in runs if not run.variant.order]
        self.reference = next(run for run in self.runs if run.variant == REFERENCE)
        ends = [held_out(run) for run in (self.reference, *self.orders)]
        self.spread = max(ends) - min(ends)

    def gap(self, run: Run) -> float:
        """Held-out loss above the FP32 reference's."""
        return held_out(run) - held_out(self.reference)

    def rival(self, run: Run) -> Run:
        """torch's run in the same format."""
        return next(
            r for r in self.runs if r.variant.stack == "torch" and r.variant.dtype == run.variant.dtype
        )

    def findings(self) -> list[Finding]:
        """With masters: no further from FP32 than another order of batches. Without: further."""
        found = []
        for run in self.runs:
            if run.variant.stack != "fusedamp":
                continue
            gap, name = self.gap(run), f"{self.task.name}, {run.variant.name}"
            figures = f"{gap:+.5f} in held-out loss; other orders of the batches: {self.spread:.5f}"
            if run.variant.masters:
                verb, held = "matches FP32", abs(gap) <= self.spread
            else:
                verb, held = "falls behind FP32", gap > self.spread
            found.append(Finding(f"{name} {verb if held else 'NOT SHOWN: ' + verb} ({figures})", held))
        return found


def held_out(run: Run) -> float:
    """Held-out loss at the end."""
    return run.evaluations[-1][1]


def table(outcome: Outcome) -> Table:
    """One row per run."""
    heads = (
        "held-out\nloss",
        "minus\nFP32",
        "accuracy",
        "train\nloss",
        "steps\nskipped",
        "bytes per\nparameter",
    )
    grid = Table(title=f"{outcome.task.name}: {outcome.task.story}", title_justify="left", title_style="bold")
    grid.add_column("run", no_wrap=True)
    for head in (*heads, "optimizer phase,\ntorch time / its time"):
        grid.add_column(head, justify="right", no_wrap=True)
    for run in outcome.runs:
        gap = "" if run is outcome.reference else f"{outcome.gap(run):+.4f}"
        rival = outcome.rival(run)
        ratio = "1" if rival is run else f"{phase_ratio(run, rival):.1f}x"
        grid.add_row(
            run.variant.name, f"{held_out(run):.4f}", gap, f"{run.evaluations[-1][2]:.1%}", f"{run.train_loss:.4f}",
            str(len(run.skipped)), f"{run.bytes_per_param:.1f}", ratio,
        )  # fmt: skip
    return grid


class Bars:
    """A progress bar per run, with its latest loss and scale."""

    def __init__(self, progress: Progress, task: Task, runs: list[Run]) -> None:
        self._progress = progress
        self._rows: list[tuple[Run, TaskID]] = [
            (run, progress.add_task(f"{task.name}  {run.variant.name}", total=task.steps, note=""))
            for run in runs
        ]

    def advance(self) -> None:
        """One step done by every run."""
        for run, row in self._rows:
            scale = f"  scale {run.scales[-1]:.0f}" if run.scaler.is_enabled() else ""
            self._progress.update(row, advance=1, note=f"loss {run.losses[-1]:.3f}{scale}")


def new_progress(**options: object) -> Progress:
    """The columns of all bars."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    return Progress(*columns, TextColumn("{task.fields[note]}"), **options)
