"""``python -m fusedamp estimate``: the table of `fusedamp.estimate` for named networks, shapes or a count."""

from __future__ import annotations

import argparse
import ast
import json
import math
import sys
from typing import Any

import torch

from .. import optim
from ..memory.estimate import estimate
from ..memory.model_shapes import MODELS, Shapes

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32, "fp64": torch.float64}
OPTIMIZERS = {n.lower(): getattr(optim, n) for n in optim.__all__ if hasattr(getattr(optim, n), "states")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on ``parser``."""
    add = parser.add_argument
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", choices=MODELS, help="a well-known network: %(choices)s", metavar="NAME")
    what.add_argument("--params", metavar="N", help="a number of parameters, such as 7e9")
    what.add_argument(
        "--shape", action="append", metavar="AxBxC", help="shape of a parameter; give one for each"
    )
    add("--optimizer", choices=OPTIMIZERS, default="adamw", help="%(choices)s (default: %(default)s)")
    add("--dtype", choices=DTYPES, default="bf16", help="format of the weights (default: %(default)s)")
    add("--grad-dtype", choices=DTYPES, help="format of the gradients (default: that of the weights)")
    add(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the optimizer, such as momentum=0.9 or master_weights=none",
    )
    add("--offload", action="store_true", help="with masters, states and update on the host")
    add("--json", action="store_true", help="machine-readable, in bytes")


def run(args: argparse.Namespace) -> int:
    """Print the table; returns the exit code: 0, or 2 for invalid options."""
    try:
        options = dict(_option(text) for text in args.set)
        found = estimate(
            _what(args),
            OPTIMIZERS[args.optimizer],
            dtype=DTYPES[args.dtype],
            grad_dtype=DTYPES.get(args.grad_dtype),
            offload=args.offload,
            **options,
        )
    except (TypeError, ValueError) as error:
        print(f"fusedamp estimate: {error}", file=sys.stderr)
        return 2
    print(json.dumps(found.as_dict(), indent=2) if args.json else found)
    return 0


def _what(args: argparse.Namespace) -> int | Shapes:
    if args.model:
        return MODELS[args.model]()
    if args.shape:
        return [_shape(text) for text in args.shape]
    try:
        count = float(args.params)
    except ValueError:
        count = math.nan
    if not 1 <= count < 2**53 or count != int(count):
        raise ValueError(f"--params is {args.params}; it must be a whole number from 1, such as 7e9")
    return int(count)


def _shape(text: str) -> tuple[int, ...]:
    sizes = text.lower().split("x")
    if not all(size.isdecimal() for size in sizes):
        raise ValueError(f"--shape is {text}; it must be whole numbers separated by x, such as 4096x1024")
    return tuple(map(int, sizes))


def _option(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    if not (name.isidentifier() and equals):
        raise ValueError(f"--set is {text}; it must be NAME=VALUE, such as momentum=0.9")
    if value.startswith("torch.") and isinstance(getattr(torch, value[6:], None), torch.dtype):
        return name, getattr(torch, value[6:])
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value  # a string, as in master_weights=none
