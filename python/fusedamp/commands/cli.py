"""The command line: ``python -m fusedamp info``, ``demo``, ``repro``, ``estimate``, ``numerics``."""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from fusedamp._C import build_info
from fusedamp.commands import estimate, numerics
from fusedamp.commands.demo import options as demo_options
from fusedamp.commands.demo.options import DemoError
from fusedamp.commands.info import describe, system_info
from fusedamp.commands.repro import options as repro_options


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 success, 1 a claim was not confirmed, 2 invalid options."""
    parser = _parser()
    args = parser.parse_args(argv)
    if args.cmake_dir:
        print(Path(__file__).resolve().parents[1] / "cmake")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    if args.command == "info":
        info = system_info()
        print(json.dumps(info, indent=2) if args.json else describe(info))
        return 0
    if args.command == "estimate":
        return estimate.run(args)
    if args.command == "numerics":
        return numerics.run(args)
    return _run(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m fusedamp",
        description="Mixed-precision training for PyTorch.",
        epilog="Start with `python -m fusedamp info`. `python -m fusedamp COMMAND --help` lists options.",
    )
    version = f"fusedamp {build_info()['version']}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    parser.add_argument(
        "--cmake-dir", action="store_true", help="print the folder of the CMake package, for -Dfusedamp_DIR"
    )
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    info = commands.add_parser("info", help="versions, build, devices, and which 16-bit format to choose")
    info.add_argument("--json", action="store_true", help="machine-readable")
    demo = commands.add_parser(
        "demo",
        help="train a small GPT and a conv net in FP32, FP16 and BF16, and compare",
        description="Fine-tune a small GPT and a conv net in FP32, FP16 and BF16: with torch's AMP stack, "
        "with fusedamp, and without master weights. Prints a table and draws a plot. Exit code 1: a "
        "claim was not confirmed.",
    )
    demo_options.add_arguments(demo)
    repro = commands.add_parser(
        "repro",
        help="reproduce published effects of 16-bit training in minutes",
        description="Train a character model with several loss factors and without master weights, as in "
        "Micikevicius et al. 2018, and show which values stall in 16 bits. Prints tables and draws a plot. "
        "Exit code 1: a claim was not confirmed.",
    )
    repro_options.add_arguments(repro)
    memory = commands.add_parser(
        "estimate",
        help="bytes of weights, gradients, masters and states, before anything is allocated",
        description="Bytes per parameter and in total, by part, with the chosen options, in all other modes, "
        "and with plain torch.",
    )
    estimate.add_arguments(memory)
    log = commands.add_parser(
        "numerics",
        help="scale, headroom, zeros and lost updates of a run, from its CSV log",
        description="Print what a run has logged with fusedamp.numerics.loggers.csv, and draw it.",
    )
    numerics.add_arguments(log)
    return parser


def _run(args: argparse.Namespace) -> int:
    name = args.command
    package = {"demo": demo_options, "repro": repro_options}[name]
    try:
        options = package.options_from(args)
    except DemoError as error:
        print(f"fusedamp {name}: {error}", file=sys.stderr)
        return 2
    # Imported late: it needs the extras, whose presence the options have checked.
    run = importlib.import_module(f"fusedamp.commands.{name}.run").run
    try:
        return int(run(options))
    except DemoError as error:
        print(f"fusedamp {name}: {error}", file=sys.stderr)
        return 1
