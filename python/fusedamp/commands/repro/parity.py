"""Training parity: the demo's GPT in every format of masters and states against FP32, with several seeds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from statistics import mean

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from fusedamp.commands.demo.options import DTYPES
from fusedamp.commands.demo.options import Options as DemoOptions
from fusedamp.commands.demo.report import Finding, Outcome
from fusedamp.commands.demo.tasks import Task, gpt_task
from fusedamp.commands.demo.train import EXTRA_ORDERS, Variant, finetune, pretrain, variants
from fusedamp.optim.core.options import STORAGE
from fusedamp.optim.state.formats import Storage

from .options import Options


def modes() -> list[Variant]:
    """List fusedamp's variants in every format of weights, masters and states."""
    return [
        Variant("fusedamp", dtype, Storage(**masters, state_dtype=states))
        for dtype in DTYPES
        for masters in (_masters() if dtype != "fp32" else [Storage()])
        for states in STORAGE["state_dtype"]
    ]


def _masters() -> Iterator[Storage]:
    for masters in STORAGE["master_weights"]:
        yield Storage(master_weights=masters)
    yield Storage(master_weights="none", stochastic_rounding=True)


@dataclass
class Mode:
    """Results of one mode per seed: its loss minus FP32's, and whether this is within FP32's spread."""

    variant: Variant
    gaps: list[float]
    within: list[bool]
    bytes_per_param: float

    @property
    def row(self) -> str:
        name = self.variant.name.replace(" fusedamp", "")
        low, high = min(self.gaps), max(self.gaps)
        return (
            f"| {name} | {self.bytes_per_param:.1f} | {mean(self.gaps):+.4f} | {low:+.4f} to {high:+.4f} | "
            f"{sum(self.within)} of {len(self.within)} |"
        )

    def finding(self) -> Finding:
        """Check the claim: masters match FP32 in every state format and with every seed; 16-bit weights
        without masters fall behind if rounded to nearest. There is no claim for stochastic rounding."""
        matches = self.variant.masters
        held = all(self.within) if matches else not any(self.within) and not any(gap < 0 for gap in self.gaps)
        claim = "matches FP32" if matches else "falls behind FP32"
        verdict = claim if held else f'does not show "{claim}"'
        return Finding(f"{self.variant.name} {verdict} (mean gap {mean(self.gaps):+.4f})", held)


def compare(task: Task, options: Options, progress: Progress) -> tuple[list[Mode], list[float]]:
    """Train all modes; returns them and FP32's spread over batch orders for each seed."""
    compared = [v for v in variants(("fp32",)) if v.stack == "torch"] + modes()
    outcomes = []
    for seed in range(options.seed, options.seed + options.seeds):
        demo = DemoOptions(seed=seed)
        bar = progress.add_task(f"seed {seed}", total=task.pretrain_steps + task.steps)
        base = pretrain(task, demo, on_step=partial(progress.advance, bar))
        for runs in finetune(task, base, demo, compared):
            progress.update(bar, advance=1, description=f"seed {seed}, loss {runs[0].losses[-1]:.3f}")
        outcomes.append(Outcome(task, runs))
    results = []
    for variant in modes():
        found = [next(r for r in outcome.runs if r.variant == variant) for outcome in outcomes]
        gaps = [outcome.gap(run) for outcome, run in zip(outcomes, found, strict=True)]
        within = [abs(gap) <= outcome.spread for outcome, gap in zip(outcomes, gaps, strict=True)]
        results.append(Mode(variant, gaps, within, found[0].bytes_per_param))
    return results, [outcome.spread for outcome in outcomes]


def run(options: Options, machine: str, console: Console) -> int:
    """Train and write the table next to the plot's path; returns 0, or 1 if a claim was not confirmed."""
    task = replace(gpt_task(None), steps=options.steps)
    with Progress(console=console) as progress:
        results, spreads = compare(task, options, progress)
    text = _markdown(results, spreads, options, machine)
    path = options.picture.with_name("parity.md")
    path.write_text(text)
    console.print(Markdown(text))
    claimed = [mode for mode in results if not mode.variant.storage.get("stochastic_rounding")]
    findings = [mode.finding() for mode in claimed]
    for finding in findings:
        console.print(
            "yes " if finding.held else "NO  ", finding.text, style="" if finding.held else "bold red"
        )
    console.print(f"table: {path}", soft_wrap=True)
    return 0 if all(finding.held for finding in findings) else 1


def _markdown(results: list[Mode], spreads: list[float], options: Options, machine: str) -> str:
    seeds = f"{options.seeds} seeds" if options.seeds > 1 else "1 seed"
    lines = [
        "# Training parity: every format of masters and states against FP32",
        "",
        f"The demo's GPT (`python -m fusedamp demo`), AdamW at lr {DemoOptions.learning_rate:g}, "
        f"{options.steps} steps, {seeds}; {machine}. A gap is the held-out loss minus that of torch in FP32 "
        "from the same start on the same batches. *Within*: for how many seeds the gap is at most FP32's "
        f"spread over {EXTRA_ORDERS} other batch orders "
        f"({', '.join(f'{spread:.4f}' for spread in spreads)}).",
        "",
        "| weights, masters and states | bytes per parameter | mean gap | smallest to largest | within |",
        "|---|---:|---:|---:|---:|",
        *(mode.row for mode in results),
    ]
    return "\n".join(lines) + "\n"
