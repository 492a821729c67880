"""Where the figures of records go: a CSV file, TensorBoard, Weights & Biases.

A logger is any object with ``log(step, values)``; ``values`` are numbers by name, such as
``numerics/headroom_bits``. A logger may have ``add_histogram(step, name, edges, counts)``, too. Records
arrive some steps late, in order of their steps.
"""

from __future__ import annotations

import csv as csv_format
import io
import math
import os
from collections.abc import Mapping
from logging import Logger as Logging
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from .bins import HUGE, TINY, bin_edges
from .record import SUMMARY, Record

PREFIX = "numerics/"
HISTOGRAM = f"{PREFIX}gradients"


class Logger(Protocol):
    """What a watch sends its figures to."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the figures of one record."""


def need_logger(logger: Any) -> Logger:
    """Return ``logger``; raises TypeError if it has no ``log(step, values)``, and says what to pass."""
    wandb_run = hasattr(logger, "define_metric")  # its log(data, step) is another one
    if callable(getattr(logger, "log", None)) and not isinstance(logger, (type, Logging)) and not wandb_run:
        return logger  # type: ignore[no-any-return]
    expected = "an object with log(step, values)"
    if wandb_run:
        expected = "fusedamp.numerics.loggers.wandb(run)"
    elif hasattr(logger, "add_scalar"):
        expected = "fusedamp.numerics.loggers.tensorboard(writer)"
    elif isinstance(logger, (str, os.PathLike)):
        expected = "fusedamp.numerics.loggers.csv(path)"
    got = f"the class {logger.__name__}" if isinstance(logger, type) else f"a {type(logger).__name__}"
    raise TypeError(f"[log_to] logger is {got}; expected {expected}")


def values_of(record: Record) -> dict[str, float]:
    """Return the summary of ``record`` under the names of logs: ``numerics/headroom_bits`` and so on."""
    return {PREFIX + name: value for name, value in record.summary().items()}


def send(logger: Logger, record: Record) -> None:
    """Log a record: the figures of its summary, and the histogram of all its gradients, unscaled, if the
    logger takes one."""
    logger.log(record.step, values_of(record))
    add_histogram = getattr(logger, "add_histogram", None)
    if add_histogram is not None and record.scale > 0:
        add_histogram(record.step, HISTOGRAM, bin_edges() / record.scale, record.histogram.sum(0))


class csv:
    """Appends a line per record to a CSV file, for ``python -m fusedamp numerics`` and for spreadsheets.

    The first line names the columns: ``step`` and the figures of :meth:`Record.summary`. What a record
    lacks is an empty cell. A file that exists is continued. A line is written whole or not at all. Use one
    file per rank.

    Args:
        path: the file; its folder must exist.

    Raises: FileNotFoundError if there is no such folder, ValueError if the file has other columns or ends
    within a line, OSError if a line cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._columns: list[str] = []
        if not self._path.parent.is_dir():
            raise FileNotFoundError(f"[loggers.csv] path is {path}; expected a file in a folder that exists")
        if self._path.exists() and self._path.stat().st_size:
            self._columns = self._columns_of_file()

    def _columns_of_file(self) -> list[str]:
        with self._path.open("rb") as file:
            first = file.readline()
            file.seek(-1, os.SEEK_END)
            complete = file.read(1) == b"\n"
        columns = next(csv_format.reader([first.decode(errors="replace")]), [])
        if columns[:1] != ["step"]:
            raise ValueError(f"[loggers.csv] {self._path}: the first column is not step; use another file")
        if not complete:
            raise ValueError(f"[loggers.csv] {self._path} ends within a line; remove or complete that line")
        return columns

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append a line. A name without a column raises ValueError."""
        lines = []
        if not self._columns:
            known = [PREFIX + name for name in SUMMARY]
            self._columns = ["step", *known, *(name for name in values if name not in known)]
            lines.append(self._columns)
        if unknown := [name for name in values if name not in self._columns]:
            raise ValueError(f"[loggers.csv] {self._path} has no column {unknown[0]}; use another file")
        cells = {"step": step} | {name: float(value) for name, value in values.items()}
        lines.append([repr(cells[name]) if name in cells else "" for name in self._columns])
        text = io.StringIO(newline="")
        csv_format.writer(text, lineterminator="\n").writerows(lines)
        with self._path.open("ab", buffering=0) as file:
            start, data = file.tell(), text.getvalue().encode()
            try:
                written = file.write(data)
                if written != len(data):
                    raise OSError(f"[loggers.csv] {self._path}: wrote {written} of {len(data)} bytes")
            except OSError:
                file.truncate(start)
                raise


class tensorboard:
    """Logs to TensorBoard: a scalar per figure, and a histogram of log2 of the unscaled gradients'
    magnitudes.

    The histogram has exponents on its axis, as TensorBoard's axis is linear. Zeros, inf and NaN are not
    part of it: ``numerics/zeros_percent`` and ``numerics/skipped`` have them. Its mean is of the bins'
    centers.

    Args:
        writer: a ``torch.utils.tensorboard.SummaryWriter``, or an object with its ``add_scalar`` and
            ``add_histogram_raw``.

    Raises: TypeError if these are missing.
    """

    def __init__(self, writer: Any) -> None:
        _need("tensorboard", "writer", writer, "a SummaryWriter", ("add_scalar", "add_histogram_raw"))
        self._writer = writer

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a scalar per value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, global_step=step)

    def add_histogram(self, step: int, name: str, edges: Tensor, counts: Tensor) -> None:
        """Add ``counts`` (int64 ``[64]``) of the bins with the lower ``edges`` (FP64 ``[64]``)."""
        # Bins are a factor of 2 wide; the first and the last have one edge, and are drawn like the others.
        upper = edges[TINY + 1 : HUGE + 1].log2()
        upper = torch.cat([upper, upper[-1:] + 1])
        counts = counts[TINY : HUGE + 1].double()
        filled = counts.nonzero().flatten().tolist()
        if not filled:
            return
        shown = slice(filled[0], filled[-1] + 1)
        counts, upper = counts[shown], upper[shown]
        centers = upper - 0.5
        self._writer.add_histogram_raw(
            f"{name}_log2",
            min=upper[0].item() - 1,
            max=upper[-1].item(),
            num=counts.sum().item(),
            sum=(counts * centers).sum().item(),
            sum_squares=(counts * centers**2).sum().item(),
            bucket_limits=upper.tolist(),
            bucket_counts=counts.tolist(),
            global_step=step,
        )


class wandb:
    """Logs to a run of Weights & Biases, with ``numerics/step`` as the axis of ``numerics/*``.

    Records arrive late, and a run takes no figures for earlier steps. So each record is a row of its own,
    without the run's step. If you number steps yourself (``run.log(..., step=...)``), log all figures of a
    step in one call.

    Args:
        run: what ``wandb.init`` returns, or an object with its ``log`` and ``define_metric``.

    Raises: TypeError if these are missing.
    """

    def __init__(self, run: Any) -> None:
        _need("wandb", "run", run, "what wandb.init() returns", ("log", "define_metric"))
        self._run, self._axis = run, f"{PREFIX}step"
        run.define_metric(self._axis)
        run.define_metric(f"{PREFIX}*", step_metric=self._axis)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Log ``values`` as one row."""
        self._run.log({self._axis: step, **values})


def _need(logger: str, name: str, value: Any, wanted: str, methods: tuple[str, ...]) -> None:
    for method in methods:
        if not callable(getattr(value, method, None)):
            raise TypeError(
                f"[loggers.{logger}] {name} is a {type(value).__name__}, without {method}; expected {wanted}"
            )


class Continued:
    """Passes records on to ``logger`` with steps counted from ``start``: a resumed run's watch counts from
    1 again.

    ``name`` stands behind ``numerics/`` in the names of values, where an optimizer is one of several.
    """

    def __init__(self, logger: Logger, start: int, name: str = "") -> None:
        self._logger, self._start = need_logger(logger), start
        self._prefix = f"{PREFIX}{name}/" if name else PREFIX
        self._histogram: Any = getattr(logger, "add_histogram", None)
        if self._histogram is not None:
            self.add_histogram = self._add_histogram

    def log(self, step: int, values: Mapping[str, float]) -> None:
        named = {self._prefix + name.removeprefix(PREFIX): value for name, value in values.items()}
        self._logger.log(self._start + step, named)

    def _add_histogram(self, step: int, name: str, *counts: Tensor) -> None:
        self._histogram(self._start + step, self._prefix + name.removeprefix(PREFIX), *counts)


def read_csv(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """Read a file of :class:`csv`: a dict per record, with ``step`` and the figures of
    :meth:`Record.summary` that it has, by their names without ``numerics/``.

    Where steps do not increase, a run was resumed, and its watch has counted from 1 again. Such steps count
    on from the last one before.

    Raises: OSError if the file cannot be read, ValueError with file and line if a line is not what the
    logger writes.
    """
    with Path(path).open(newline="", encoding="utf-8") as file:
        reader = csv_format.reader(file)
        try:
            columns = next(reader, [])
            if columns[:1] != ["step"] or f"{PREFIX}scale" not in columns:
                raise ValueError(f"{path}, line 1: expected columns step, {PREFIX}scale, ... of loggers.csv")
            rows: list[dict[str, float]] = []
            last = start = 0.0
            for cells in reader:
                row = _row(f"{path}, line {reader.line_num}", columns, cells)
                start += last if row["step"] <= last else 0
                last = row["step"]
                rows.append(row | {"step": start + last})
        except (UnicodeDecodeError, csv_format.Error) as error:
            raise ValueError(f"{path}, line {reader.line_num + 1}: not a line of text ({error})") from None
    return rows


def _row(where: str, columns: list[str], cells: list[str]) -> dict[str, float]:
    if len(cells) != len(columns):
        raise ValueError(f"{where}: {len(cells)} cells; expected {len(columns)}, as in line 1")
    row = {}
    for column, cell in zip(columns, cells, strict=True):
        name = column.removeprefix(PREFIX)
        if cell and name in ("step", *SUMMARY):
            try:
                row[name] = float(cell)
            except ValueError:
                raise ValueError(f"{where}: {column} is {cell!r}; expected a number") from None
    for name in ("step", *SUMMARY[:5]):
        if name not in row or math.isnan(row[name]):
            raise ValueError(f"{where}: {name} is missing; expected a number")
    return row
