"""``python -m fusedamp numerics``: a run's log of `fusedamp.numerics` as a table and a plot."""

from __future__ import annotations

import argparse
import sys

from ..numerics.loggers import read_csv
from ..numerics.table import over_time


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on ``parser``."""
    add = parser.add_argument
    add("file", metavar="RUN.CSV", help="what fusedamp.numerics.loggers.csv has written")
    add("--plot", metavar="FILE", help="also draw the run into a .png, .svg or .pdf file (needs matplotlib)")
    add("--lines", type=int, default=20, help="at most so many lines of steps (default: %(default)s)")


def run(args: argparse.Namespace) -> int:
    """Print the table and draw the plot; returns the exit code: 0, or 2 for an invalid file or option."""
    try:
        rows = read_csv(args.file)
        print(over_time(rows, args.lines))
        if args.plot is not None:
            from ..numerics.chart import draw_run

            draw_run(rows, args.plot)
            print(f"\nPlot: {args.plot}")
    except OSError as error:
        print(f"fusedamp numerics: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    except (ImportError, ValueError) as error:
        print(f"fusedamp numerics: {error}", file=sys.stderr)
        return 2
    return 0
