"""Reports the experiments' results: tables, and claims with whether they held."""

from __future__ import annotations

from rich.table import Table

from fusedamp.commands.demo.report import Finding

from .experiment import Result
from .stalls import Stall

TOO_SMALL = -8  # exponent of the loss factor from which FP16's gradients vanish here


class Sweep:
    """Finished runs; ``spread`` is the range of FP32's final losses over several batch orders."""

    def __init__(self, title: str, results: list[Result]) -> None:
        self.title, self.results, self.reference = title, results, results[0]
        ends = [result.held_out for result in results if result.setup.dtype == "fp32"]
        self.spread = max(ends) - min(ends)

    def gap(self, result: Result) -> float:
        return result.held_out - self.reference.held_out

    def finding(self, result: Result, matches: bool) -> Finding:
        gap = self.gap(result)
        held = abs(gap) <= self.spread if matches else not gap <= self.spread
        claim = "matches FP32" if matches else "falls behind FP32"
        verdict = claim if held else f'does not show "{claim}"'
        text = f"{result.setup.name}: {verdict} ({gap:+.4f} in held-out loss, spread {self.spread:.4f})"
        return Finding(text, held)

    def findings(self) -> list[Finding]:
        """Check the claims: large loss factors and masters match; small factors and weights without masters
        fall behind."""
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
    grid = Table(title="Stalled values", title_justify="left", title_style="bold")
    for head in ("test", "stack and formats"):
        grid.add_column(head)
    for head in ("expected", "got"):
        grid.add_column(head, justify="right", no_wrap=True)
    for stall in found:
        style = "" if stall.arrived else "bold" if not stall.ours else "bold red"
        grid.add_row(stall.story, stall.who, f"{stall.wanted:.5g}", f"{stall.got:.5g}", style=style)
    return grid


def stall_findings(found: list[Stall]) -> list[Finding]:
    """Check the claims about fusedamp's modes; the others have none."""
    return [
        Finding(
            f"{stall.who}: {stall.story} {'reaches its value' if stall.arrived else 'stalls'} "
            f"({stall.got:.5g}, expected {stall.wanted:.5g})",
            stall.arrived,
        )
        for stall in found
        if stall.ours
    ]
