"""The command line: ``python -m fusedamp info``, ``demo``, ``estimate``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence

import torch

import fusedamp
from fusedamp import command_estimate
from fusedamp.capabilities import describe, system_info
from fusedamp.demo.options import DemoError, add_arguments, options_from


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0 fine, 1 the demo's claim did not show, 2 bad options."""
    args = _parser().parse_args(argv)
    if args.command == "info":
        info = system_info()
        print(json.dumps(info, indent=2) if args.json else describe(info))
        return 0
    if args.command == "estimate":
        return command_estimate.run(args)
    return _demo(args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m fusedamp", description=fusedamp.__doc__)
    version = f"fusedamp {fusedamp.__version__}, torch {torch.__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    info = commands.add_parser("info", help="versions, build, devices, and which 16-bit format to choose")
    info.add_argument("--json", action="store_true", help="machine-readable")
    demo = commands.add_parser(
        "demo",
        help="train a small GPT and a conv net in FP32, FP16 and BF16, and compare",
        description="Fine-tune a small GPT and a conv net in FP32, FP16 and BF16: with torch's AMP stack, "
        "with fusedamp, and without master weights. Prints a table and draws a picture. Exit code 1: the "
        "claim did not show.",
    )
    add_arguments(demo)
    memory = commands.add_parser(
        "estimate",
        help="bytes of weights, gradients, masters and states, before anything is allocated",
        description="Bytes per parameter and in all, by part: with the chosen options, in every other mode, "
        "and with plain torch.",
    )
    command_estimate.add_arguments(memory)
    return parser


def _demo(args: argparse.Namespace) -> int:
    try:
        options = options_from(args)
    except DemoError as error:
        print(f"fusedamp demo: {error}", file=sys.stderr)
        return 2
    from fusedamp.demo.run import run  # needs the extras, which options_from has looked for

    try:
        return run(options)
    except DemoError as error:
        print(f"fusedamp demo: {error}", file=sys.stderr)
        return 1
