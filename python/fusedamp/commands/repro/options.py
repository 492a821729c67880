"""Options of the experiments, checked before training."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from fusedamp.commands.demo.options import need, need_extras, picture_path

EXTRAS = ("rich", "matplotlib", "numpy")
STEPS, PARITY_STEPS = 300, 120


@dataclass(frozen=True)
class Options:
    """Checked options. ``factors`` are exponents of 2."""

    steps: int = STEPS
    seed: int = 0
    batch: int = 2048
    width: int = 256
    factors: tuple[int, ...] = (8, 0, -4, -8, -10, -12)
    stall_steps: int = 5000
    picture: Path = Path("repro.png")
    threads: int | None = None
    parity: bool = False
    seeds: int = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options on ``parser``."""
    add = parser.add_argument
    add(
        "--steps",
        type=int,
        metavar="N",
        help=f"training steps (default: {STEPS}; with --parity: {PARITY_STEPS})",
    )
    add("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    add(
        "--parity",
        action="store_true",
        help="instead: the demo's GPT in every format of masters and states against FP32; writes parity.md",
    )
    add(
        "--seeds",
        type=int,
        default=Options.seeds,
        metavar="N",
        help="with --parity: number of seeds, from --seed on (default: %(default)s)",
    )
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--out",
        default="repro.png",
        metavar="PATH",
        help="plot, or a folder for it (default: %(default)s)",
    )


def options_from(args: argparse.Namespace) -> Options:
    """Check parsed arguments and turn them into `Options`; raises `DemoError` with one line."""
    need_extras(EXTRAS, "the experiments need")
    need(args.steps is None or args.steps > 0, f"--steps is {args.steps}; it must be at least 1")
    need(args.threads is None or args.threads > 0, f"--threads is {args.threads}; it must be at least 1")
    need(0 <= args.seed < 2**31, f"--seed is {args.seed}; it must be between 0 and 2**31 - 1")
    need(args.seeds > 0, f"--seeds is {args.seeds}; it must be at least 1")
    return Options(
        steps=args.steps or (PARITY_STEPS if args.parity else STEPS),
        seed=args.seed,
        picture=picture_path(Path(args.out), "repro.png"),
        threads=args.threads,
        parity=args.parity,
        seeds=args.seeds,
    )
