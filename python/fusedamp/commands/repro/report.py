"""What the experiments say: tables, and the claims with whether they held."""

from __future__ import annotations

from rich.table import Table

from fusedamp.commands.demo.report import Finding

from .experiment import Result
from .stalls import Stall

TOO_SMALL = -8  # exponent of the loss factor from which FP16's gradients vanish here


class Sweep:
    """Finished runs, and FP32 on several orders of the batches; how far these end apart is the yardstick."""

    def __init__(self, title: str, results: list[Result]) -> None:
        self.title, self.results, self.reference = title, results, results[0]
        ends = [result.held_out for result in results if result.setup.dtype == "fp32"]
        self.yardstick = max(ends) - min(ends)

    def gap(self, result: Result) -> float:
        return result.held_out - self.reference.held_out

    def finding(self, result: Result, matches: bool) -> Finding:
        gap = self.gap(result)
        held = abs(gap) <= self.yardstick if matches else not gap <= self.yardstick
        claim = "matches FP32" if matches else "falls behind FP32"
        verdict = claim if held else f'does not show "{claim}"'
        text = f"{result.setup.name}: {verdict} ({gap:+.4f} in held-out loss, yardstick {self.yardstick:.4f})"
        return Finding(text, held)

    def findings(self) -> list[Finding]:
        """Large loss factors and masters match; small factors and weights without masters fall behind."""
        found = []
        for result in self.results:
            factor = result.setup.factor
            if result.setup.dtype == "fp32":
                continue
            if result.setup.options.get("master_weights") == "none":
                found.append(self.finding(result, matches=False))
            elif factor is None or factor >= 0:
                found.append(self.finding(result, matches=True))
            elif factor <= TOO_SMALL:
                found.append(self.finding(result, matches=False))
        return found

    def table(self) -> Table:
        grid = Table(title=self.title, title_justify="left", title_style="bold")
        grid.add_column("run", no_wrap=True)
        for head in ("training\nloss", "held-out\nloss", "minus\nFP32", "gradients\nthat are 0"):
            grid.add_column(head, justify="right", no_wrap=True)
        for result in self.results:
            grid.add_row(
                result.setup.name,
                f"{result.curve[-1][1]:.4f}",
                f"{result.held_out:.4f}",
                "" if result is self.reference else f"{self.gap(result):+.4f}",
                f"{result.vanished:.1%}",
            )
        return grid


def stall_table(found: list[Stall]) -> Table:
    grid = Table(title="Numbers that stop", title_justify="left", title_style="bold")
    for head in ("what", "who"):
        grid.add_column(head)
    for head in ("wanted", "got"):
        grid.add_column(head, justify="right", no_wrap=True)
    for stall in found:
        style = "" if stall.arrived else "bold" if not stall.ours else "bold red"
        grid.add_row(stall.story, stall.who, f"{stall.wanted:.5g}", f"{stall.got:.5g}", style=style)
    return grid


def stall_findings(found: list[Stall]) -> list[Finding]:
    """What we claim of our own modes; the others' figures are shown as they are."""
    return [
        Finding(
            f"{stall.who}: {stall.story} {'ends where it should' if stall.arrived else 'stops'} "
            f"({stall.got:.5g}, wanted {stall.wanted:.5g})",
            stall.arrived,
        )
        for stall in found
        if stall.ours
    ]
