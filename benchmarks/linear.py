"""``--linear``: linear layers of fusedamp.nn against torch's, on the CPU; `linear_rows` lists the pairs.

Each pair starts from the same weights, must reach the same result within its roundings, and is timed
alternately in one process. The temporary memory of a call is what it allocates beyond what was there.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import track
from torch.profiler import ProfilerActivity, profile

from .duel import WrongResult
from .linear_rows import SHORT, Call, Row, Sides, rows
from .machine import Machine
from .report import QUICK, threads_of
from .results import write_csv
from .timing import Budget, Limits, Timing, alternate, percentile

SECONDS, QUICK_SECONDS = 280.0, 6.0
LONGEST = 4.0  # of one measurement
WARM_UP = 2


@dataclass(frozen=True)
class Point:
    row: Row
    timing: Timing
    temporary: tuple[float, float]  # bytes, ours and theirs

    def ratio(self, percent: float = 50) -> float:
        """Return the speedup: their time / our time."""
        return percentile(self.timing.ratios(), percent)

    @property
    def slower(self) -> bool:
        """True if at least four of five pairs agree."""
        return self.ratio(80) < 1

    @property
    def missed(self) -> bool:
        """True if the median is below the aim, unless both sides are as fast within the spread."""
        aim = self.row.aim
        return aim is not None and not (self.ratio() >= aim or self.ratio(80) >= max(1.0, aim))

    def rate(self, who: str) -> str:
        """Return GFLOP/s, or the microseconds of a layer's call in rows of host time."""
        seconds = percentile(self.timing.seconds(who), 50)
        if self.row.calls > 1:
            return f"{seconds / self.row.calls * 1e6:.1f} us"
        return f"{self.row.flops / seconds / 1e9:.3g}"

    def record(self, machine: Machine) -> dict[str, object]:
        row = self.row
        return {
            "row": row.what,
            "where": row.where,
            "dtype": SHORT[row.dtype],
            "rival": row.rival,
            "threads": self.timing.threads,
            "clock": self.timing.clock,
            **{f"ratio_p{percent}": self.ratio(percent) for percent in (20, 50, 80)},
            "aim": row.aim,
            **{f"{who}_ms": percentile(self.timing.seconds(who), 50) * 1e3 for who in ("ours", "theirs")},
            "flops": row.flops,
            "our_bytes": row.our_bytes,
            "rival_bytes": row.rival_bytes,
            "our_temporary": self.temporary[0],
            "rival_temporary": self.temporary[1],
            "clean": len(self.timing.clean),
            "dropped": self.timing.dropped,
            "other_load": self.timing.other_load,
            **vars(machine),
        }


def checked(row: Row, sides: Sides) -> None:
    """Run both sides once; raises WrongResult unless their results agree within the row's roundings."""
    ours, theirs = (side().detach().double().clone() for side in sides)
    apart, size = float((ours - theirs).norm()), float(theirs.norm())
    bound = row.roundings * torch.finfo(row.dtype).eps / 2
    if not apart <= bound * size:
        raise WrongResult(f"{row.name}: results differ by {apart / size:.2g}; rounding explains {bound:.2g}")


def temporary(call: Call) -> float:
    """Return the largest number of bytes that ``call`` has allocated at once from torch's CPU allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        call()
    held = most = 0
    for event in sorted(seen.profiler.kineto_results.events(), key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            most = max(most, held)
    return float(most)


def measure(row: Row, threads: list[int], samples: int, budget: Budget) -> list[Point]:
    """Check one row, and time it with each number of threads."""
    gc.collect()  # free the previous row's memory
    torch.manual_seed(0)
    sides = row.make()
    checked(row, sides)
    held = temporary(sides[0]), temporary(sides[1])
    ours, theirs = (_silent(side) for side in sides)
    points = []
    for count in threads:
        limits = Limits(samples, budget.share(), WARM_UP)
        timing = alternate(ours, theirs, lambda: None, None, count, limits)
        points.append(Point(row, timing, held))
    return points


def _silent(call: Call) -> Callable[[], None]:
    def run() -> None:
        call()

    return run


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    compared = list(rows("cpu", options.quick))
    seconds = QUICK_SECONDS if options.quick else SECONDS
    budget, points = Budget(seconds, len(compared) * len(options.threads), LONGEST), []
    for row in track(compared, "linear", console=console):
        points += measure(row, options.threads, options.samples, budget)
    name = f"{machine.kind}-linear" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [point.record(machine) for point in points])
    text = report(points, machine, options.quick)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    console.print("Written:", *(f"{out / name}{ending}" for ending in (".csv", ".md")), soft_wrap=True)
    return 0


METHOD = """\
**Numbers are speedups (torch time / fusedamp time)**, measured alternately in one process: the median over
pairs of samples, then the 20th to 80th percentile; for one thread of CPU time, for more of wall time.
Weights are FP32 and products run under autocast, except where a row says otherwise; gradients exist and are
added to. *Aim*: the least speedup that a row must reach; rows without one compute something that torch does
not, an unrounded weight gradient. *GFLOP/s* and *temporary* memory: ours / theirs; of host time rows the
time of one layer's call. *MB*: the bytes that each side's passes move (`benchmarks/linear_rows.py`).
"""


def report(points: list[Point], machine: Machine, quick: bool) -> str:
    """Return the report of one run: every row, and those that are slower with the reason."""
    threads = sorted({point.timing.threads for point in points})
    heads = ["row", "where", "dtype", "against", *map(threads_of, threads)]
    heads += ["aim", "GFLOP/s", "MB", "temporary MB"]
    table = [heads, ["---"] * 4 + ["---:"] * (len(heads) - 4)]
    by_row = {point.row.name: [p for p in points if p.row.name == point.row.name] for point in points}
    for group in by_row.values():
        first, row = group[0], group[0].row
        cells = [row.what, row.where, SHORT[row.dtype], row.rival, *map(_cell, group)]
        cells += [
            "" if row.aim is None else f"{row.aim:.2f}",
            f"{first.rate('ours')} / {first.rate('theirs')}",
        ]
        cells += [_pair(row.our_bytes, row.rival_bytes), _pair(*first.temporary)]
        table.append(cells)
    slower = [
        f"- {p.row.name}, {threads_of(p.timing.threads)}: {_cell(p)}. {p.row.why}" for p in points if p.slower
    ]
    missed = [f"- {p.row.name}, {threads_of(p.timing.threads)}: {_cell(p)}" for p in points if p.missed]
    load = median(point.timing.other_load for point in points)
    parts = [
        f"# Linear layers on {machine.title}",
        *([QUICK] if quick else []),
        METHOD,
        f"CPU {machine.cpu}, {machine.cores} cores, flags {machine.flags}; torch {machine.torch}, fusedamp "
        f"{machine.fusedamp} at commit {machine.commit}, {machine.date}.",
        *([f"**Other processes kept {load:.1f} cores busy.**"] if load >= 0.1 else []),
        "\n".join(f"| {' | '.join(cells)} |" for cells in table),
        *([] if quick else [f"## Aims\n\n{_listed(missed, 'All are met.', 'Missed:')}"]),
        f"## Where fusedamp is slower\n\n{_listed(slower, 'Nowhere.')}",
    ]
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _listed(lines: list[str], none: str, some: str = "") -> str:
    return "\n".join([some, "", *lines]).strip() if lines else none


def _pair(ours: float, theirs: float) -> str:
    return f"{ours / 1e6:.3g} / {theirs / 1e6:.3g}"


def _cell(point: Point) -> str:
    if not point.timing.clean:
        return "no clean sample"
    text = f"**{point.ratio():.2f}** ({point.ratio(20):.2f} to {point.ratio(80):.2f})"
    return f"{text} missed" if point.missed else text
