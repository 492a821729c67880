"""Records as a table: of parameters, the worst first, or of a run's steps."""

from __future__ import annotations

import importlib.util
import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..ops.checks import count
from .bins import BINS, CEILING, FLOOR, HUGE, NORMAL, NOT_FINITE, TINY, ZERO, bin_of
from .record import Record, headroom, percent, share

BLOCKS = "▁▂▃▄▅▆▇█"
COLUMNS = 20  # of the histogram, two binades each
SHORTEST = 16  # characters of a name, however narrow the terminal is
NEAR = 1.0  # bits of headroom below which an overflow is near
MARGIN = 2  # bits of headroom to keep, as GradScaler(policy="headroom") does
MANY = 0.01  # the share from which subnormal elements and lost updates are worth a sentence

FIGURES = ("headroom\nbits", "zeros\n%", "subnormal\n%", "lost\n%", "update /\nweight")
RULER = " scaled gradients\n2^-24 2^-14      2^16 "
LEGEND = """
headroom: bits from the largest element to FP16's ceiling, 65504 (over: inf or NaN). subnormal: elements below
2^-14, where FP16 loses precision, down to 2^-24. lost: updates that a 16-bit weight without a master weight
would round away. The histogram is of elements as stored, multiplied by the scale; < and > stand for elements
outside FP16's range, ! for inf or NaN."""


@dataclass(frozen=True)
class Row:
    """The figures of one parameter, or of all, over some records. Shares are None without updates."""

    name: str
    overflows: int
    headroom: float
    zeros: float
    subnormal: float
    lost: float | None
    ratio: float | None
    histogram: list[int]

    @property
    def badness(self) -> tuple[float, ...]:
        """Sorts the worst first."""
        return (-self.overflows, min(self.headroom, NEAR), -self.subnormal, -self.zeros, self.headroom)

    @property
    def style(self) -> str:
        return "bold red" if self.overflows else "yellow" if self.headroom < NEAR else ""

    def cells(self) -> list[str]:
        """Return the texts of `FIGURES`."""
        shares = [percent(value) for value in (self.zeros, self.subnormal, self.lost)]
        return [_bits(self.headroom), *shares, "" if self.ratio is None else f"{self.ratio:.1e}"]


def render(records: Sequence[Record], limit: int = 20, color: bool | None = None) -> str:
    """Return a table of the parameters of ``records``, the worst first, and below it what to do.

    The order is: parameters with inf or NaN, most elements first; then those with less than 1 bit of
    headroom, least first; then by subnormal elements, zeros, headroom. Figures are of all records together:
    counts are summed, of headroom the least counts. Parameters with one name share a line.

    Args:
        records: any number of them.
        limit: at most so many parameters have a line.
        color: whether lines are colored; by default if rich is installed and the output is a terminal.

    Raises: ValueError if ``limit`` is not a whole number from 1, TypeError if a record is not a ``Record``.
    """
    limit = count("[table]", "limit", limit, "lines of parameters")
    for i, record in enumerate(records):
        if not isinstance(record, Record):
            raise TypeError(f"[table] records[{i}] is a {type(record).__name__}; expected a Record")
    if not records:
        return "No records yet. The first one comes with the first due step, which is step `every`."
    rows = sorted(rows_of(records), key=lambda row: row.badness)
    if not rows:
        return f"{_title(records)}. No parameter had a gradient."
    shown = _columns(rows)
    heads = ["parameter", "inf,\nNaN", *FIGURES[:shown], RULER]
    cells = [
        [row.name, str(row.overflows or ""), *row.cells()[:shown], blocks(row.histogram)]
        for row in rows[:limit]
    ]
    over = [row.name for row in rows if row.overflows]
    near = [row.name for row in rows if not row.overflows and row.headroom < NEAR]
    lines = [(f"{_title(records)}. {_parameters(rows)}, worst first.", "bold"), ("", "")]
    lines += _grid(heads, cells, [row.style for row in rows])
    lines += [(f"... and {len(rows) - limit:,} more", "")] * (len(rows) > limit)
    lines += [(line, "dim") for line in LEGEND.split("\n")]
    lines += [("", ""), *((text, "bold") for text in advice(_now(records), over, near))]
    return _colored(lines, color)


def over_time(rows: Sequence[dict[str, float]], limit: int = 20, color: bool | None = None) -> str:
    """Return a table of a run's records, as ``loggers.read_csv`` returns them, and below it what to do now.

    A line of several records has the last scale, the number of skipped records, the least headroom of the
    others, and means of shares. The advice is on the last line.

    Args:
        rows: a dict per record.
        limit: at most so many lines; neighboring records share one.
        color: as for :func:`render`.

    Raises: ValueError if ``limit`` is not a whole number from 1.
    """
    limit = count("[numerics]", "limit", limit, "lines of the table")
    if not rows:
        return "No records: the file has no line after its first."
    size = math.ceil(len(rows) / limit)
    chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
    lines = [_line(chunk) for chunk in chunks]
    shown = _columns(lines)
    cells = [
        [line.name, _scale(chunk[-1]["scale"]), str(line.overflows or ""), *line.cells()[:shown]]
        for chunk, line in zip(chunks, lines, strict=True)
    ]
    skipped = sum(row["skipped"] for row in rows)
    title = f"{len(rows):,} records" + (f", {skipped:.0f} of them skipped" if skipped else "")
    grid = _grid(["steps", "scale", "skipped", *FIGURES[:shown]], cells, [line.style for line in lines])
    last = [(text, "bold") for text in advice(lines[-1])]
    return _colored([(title, "bold"), ("", ""), *grid, ("", ""), *last], color)


def rows_of(records: Sequence[Record], together: bool = False) -> list[Row]:
    """Return the figures of each parameter, in order of first appearance, or of all parameters
    ``together``."""
    where: dict[str, int] = {}
    for record in records:
        for name in record.names:
            where.setdefault(name, 0 if together else len(where))
    names = ["all parameters"] if together else list(where)
    counts = torch.zeros(len(names), BINS, dtype=torch.int64, device="cpu")
    updates = torch.zeros(len(names), 2, dtype=torch.int64, device="cpu")
    squares = torch.zeros(len(names), 2, dtype=torch.float64, device="cpu")
    largest = torch.zeros(len(names), dtype=torch.float64, device="cpu")
    updated = set()
    for record in records:
        index = torch.tensor([where[name] for name in record.names], dtype=torch.int64, device="cpu")
        counts.index_add_(0, index, record.histogram)
        largest.scatter_reduce_(0, index, record.largest, "amax")
        if record.moved is not None and record.lost is not None:
            updates.index_add_(0, index, torch.stack([record.lost, record.moved], 1))
        if record.update_norm is not None and record.weight_norm is not None:
            squares.index_add_(0, index, torch.stack([record.update_norm, record.weight_norm], 1).square())
            updated.update(index.tolist())
    numel = counts.sum(1)
    columns = (
        counts[:, NOT_FINITE],
        headroom(largest),
        share(counts[:, ZERO], numel),
        share(counts[:, TINY : bin_of(NORMAL)].sum(1), numel),
        share(updates[:, 0], updates[:, 1]),
        share(squares[:, 0], squares[:, 1]).sqrt(),
        counts,
    )
    rows = [Row(*row) for row in zip(names, *(column.tolist() for column in columns), strict=True)]
    return [row if i in updated else replace(row, lost=None, ratio=None) for i, row in enumerate(rows)]


def blocks(histogram: Sequence[int]) -> str:
    """Return a histogram as 20 blocks from FP16's floor to its ceiling, two binades each, between two marks.

    Heights are shares of the fullest column; a column with an element has a block. ``<``: elements below
    2^-24, ``>``: above the ceiling, ``!``: inf or NaN.
    """
    low, high = bin_of(FLOOR), bin_of(CEILING)
    pairs = [histogram[i] + histogram[i + 1] for i in range(low, high, (high - low) // COLUMNS)]
    most = max(pairs)
    bars = "".join(BLOCKS[math.ceil(len(BLOCKS) * n / most) - 1] if n else " " for n in pairs)
    above = "!" if histogram[NOT_FINITE] else ">" if any(histogram[high : HUGE + 1]) else " "
    return ("<" if any(histogram[TINY:low]) else " ") + bars + above


def advice(total: Row, over: Sequence[str] = (), near: Sequence[str] = ()) -> list[str]:
    """Return what to do, one text per finding.

    Args:
        total: the figures of all parameters together, now.
        over: names of the parameters with inf or NaN.
        near: names of those with less than 1 bit of headroom.
    """
    found = []
    if over:
        what = "A scaler skips such steps, and lowers the scale."
        found.append(f"{_parameters(over)} overflowed: {_listed(over)}. {what}")
    if near:
        found.append(
            f"{_parameters(near)} with less than 1 bit of headroom: {_listed(near)}. An overflow is near."
        )
    if not over and not near and total.headroom < NEAR:
        found.append("Less than 1 bit of headroom. An overflow is near.")
    if total.headroom == math.inf:
        found.append("All gradients are 0.")
    if total.subnormal >= MANY and not over:
        text = f"{percent(total.subnormal)} % of all elements are subnormal in FP16"
        spare = math.floor(total.headroom) - MARGIN
        if spare > 0:
            text += (
                f", with {total.headroom:.1f} bits of headroom. A loss scale 2^{spare} times as large fits."
            )
            text += " BF16 needs none."
        else:
            text += ", and the largest are near the ceiling. No loss scale fits them all; BF16 has the range."
        found.append(text)
    if total.lost is not None and total.lost >= MANY:
        what = "16-bit weights need FP32 master weights."
        found.append(f"Updates lost without masters: {percent(total.lost)} %. {what}")
    return found or [f"Nothing to do: {total.headroom:.1f} bits of headroom, few subnormal elements."]


def shorten(name: str, width: int) -> str:
    """Return a name of at most ``width`` characters; its end stays, as it tells parameters apart."""
    return name if len(name) <= width else "…" + name[len(name) - width + 1 :]


def _columns(rows: Sequence[Row]) -> int:
    """Return how many of `FIGURES` are known: the last two are of updates."""
    return len(FIGURES) - 2 * all(row.lost is None for row in rows)


def _now(records: Sequence[Record]) -> Row:
    """Return the figures of the last step that was taken, but with the least headroom that all such steps
    would have at its scale."""
    some = [record for record in records if record.names]
    taken = [record for record in some if not record.skipped] or some
    scale, bits = taken[-1].scale, [min(record.headroom_bits.tolist()) for record in taken]
    least = [b + math.log2(r.scale / scale) for b, r in zip(bits, taken, strict=True) if r.scale and scale]
    return replace(rows_of(taken[-1:], together=True)[0], headroom=min(least, default=bits[-1]))


def _line(rows: Sequence[dict[str, float]]) -> Row:
    """Return the figures of some records of a run; ``overflows`` is how many were skipped."""
    first, last = rows[0]["step"], rows[-1]["step"]
    taken = [row for row in rows if not row["skipped"]]

    def mean(name: str) -> float | None:
        values = [row[name] for row in rows if name in row]
        return sum(values) / len(values) if values else None

    lost = mean("lost_updates_percent")
    return Row(
        name=f"{first:.0f}" if first == last else f"{first:.0f} to {last:.0f}",
        overflows=len(rows) - len(taken),
        headroom=min(row["headroom_bits"] for row in taken or rows),
        zeros=(mean("zeros_percent") or 0) / 100,
        subnormal=(mean("subnormal_percent") or 0) / 100,
        lost=None if lost is None else lost / 100,
        ratio=mean("update_ratio"),
        histogram=[],
    )


def _title(records: Sequence[Record]) -> str:
    steps, scales = [r.step for r in records], {r.scale for r in records}
    skipped = sum(r.skipped for r in records)
    text = f"Step {steps[0]}" if len(steps) == 1 else f"{len(steps)} steps from {min(steps)} to {max(steps)}"
    text += f", {skipped} skipped" if skipped else ""
    return text + ", loss scale " + " to ".join(_scale(scale) for scale in sorted({min(scales), max(scales)}))


def _parameters(some: Sequence[object]) -> str:
    return f"{len(some):,} parameter{'s' * (len(some) != 1)}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3:,} more" if len(names) > 3 else "")


def _bits(value: float) -> str:
    return {-math.inf: "over", math.inf: "all 0"}.get(value, f"{value:.1f}")


def _scale(value: float) -> str:
    exponent = math.log2(value) if value > 0 else math.nan
    return f"2^{exponent:.0f}" if exponent.is_integer() and not 1e-3 < value < 1e6 else f"{value:g}"


def _grid(heads: list[str], rows: list[list[str]], styles: list[str]) -> list[tuple[str, str]]:
    """Return the lines of a table with their styles. The first column is shortened to fit the terminal, as
    far as its texts stay different."""
    top, bottom = zip(*(("\n" + head).split("\n")[-2:] for head in heads), strict=True)
    table = [top, bottom, *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(heads))]
    free = shutil.get_terminal_size().columns - sum(2 + width for width in widths[1:])
    names = {row[0] for row in rows}
    fitting = range(max(free, SHORTEST), widths[0])
    enough = (width for width in fitting if len({shorten(name, width) for name in names}) == len(names))
    widths[0] = next(enough, widths[0])
    lines = []
    for name, *cells in table:
        parts = [shorten(name, widths[0]).ljust(widths[0]), *map(str.rjust, cells, widths[1:])]
        lines.append("  ".join(parts).rstrip())
    return list(zip(lines, ["bold", "bold", *styles], strict=False))


def _colored(lines: list[tuple[str, str]], color: bool | None) -> str:
    plain = "\n".join(text for text, _ in lines)
    if color is False or importlib.util.find_spec("rich") is None:
        return plain
    from rich.console import Console
    from rich.text import Text

    console = Console(force_terminal=color)
    with console.capture() as captured:
        for line, style in lines:
            console.print(Text(line, style), soft_wrap=True)
    text: str = captured.get()
    return text.removesuffix("\n")
