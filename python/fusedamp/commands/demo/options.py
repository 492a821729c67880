"""Options of the demo, checked before loading or training."""

from __future__ import annotations

import argparse
import importlib.util
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LEARNING_RATE = 3e-5
INIT_SCALE = 2.0**24
MIN_TEXT_BYTES = 16_384
EXTRAS = ("rich", "matplotlib", "sklearn", "numpy")


class DemoError(Exception):
    """An error to report to the user in one line."""


@dataclass(frozen=True)
class Options:
    """Checked options. ``dtypes`` are the compared formats besides the FP32 reference."""

    tasks: tuple[str, ...] = ("gpt", "digits")
    dtypes: tuple[str, ...] = ("fp32", "fp16", "bf16")
    data: Path | None = None
    steps: int | None = None
    seed: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    learning_rate: float = LEARNING_RATE
    init_scale: float = INIT_SCALE
    policy: Literal["overflow", "headroom"] = "overflow"
    picture: Path = Path("demo.png")
    threads: int | None = None
    quick: bool = False
    numerics: bool = False
    energy: bool = False


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the demo's options on ``parser``."""
    add = parser.add_argument
    add("--task", choices=("gpt", "digits", "all"), default="all", help="what to train (default: all)")
    add("--dtype", choices=(*DTYPES, "all"), default="all", help="format compared with FP32 (default: all)")
    add("--data", metavar="FILE", help="text to fine-tune the GPT on (default: Python's language reference)")
    add("--steps", type=int, metavar="N", help="fine-tuning steps (default: gpt 120, digits 480)")
    add(
        "--numerics",
        action="store_true",
        help="watch the gradients of fusedamp's FP16 runs: tables and plots",
    )
    add("--quick", action="store_true", help="a third of the steps")
    add("--energy", action="store_true", help="then measure joules per sample of each format, a minute")
    add(
        "--lr",
        type=float,
        default=LEARNING_RATE,
        help="learning rate of the fine-tuning (default: %(default)g)",
    )
    add(
        "--init-scale",
        type=float,
        default=INIT_SCALE,
        help="first loss scale of the FP16 runs (default: 2**24)",
    )
    add(
        "--policy",
        choices=("overflow", "headroom"),
        default="overflow",
        help="how fusedamp's loss scale moves (default: %(default)s, as torch's)",
    )
    add("--seed", type=int, default=0, help="seed of weights and batches (default: %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N (default: a GPU if available)")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")
    add(
        "--out",
        default="demo.png",
        metavar="PATH",
        help="plot (.png), or a folder for it (default: %(default)s)",
    )


def options_from(args: argparse.Namespace) -> Options:
    """Check parsed arguments and turn them into `Options`; raises `DemoError` with one line."""
    need_extras(EXTRAS, "the demo needs")
    need(
        not args.numerics or args.dtype in ("fp16", "all"),
        f"--numerics watches FP16; --dtype is {args.dtype}",
    )
    need(args.steps is None or args.steps > 0, f"--steps is {args.steps}; it must be at least 1")
    need(args.threads is None or args.threads > 0, f"--threads is {args.threads}; it must be at least 1")
    need(0 <= args.seed < 2**31, f"--seed is {args.seed}; it must be between 0 and 2**31 - 1")
    need(math.isfinite(args.lr) and args.lr > 0, f"--lr is {args.lr}; it must be positive and finite")
    need(0 < args.init_scale <= 2.0**100, f"--init-scale is {args.init_scale}; it must be in (0, 2**100]")
    return Options(
        tasks=("gpt", "digits") if args.task == "all" else (args.task,),
        dtypes=tuple(DTYPES) if args.dtype == "all" else (args.dtype,),
        data=_text_file(args.data, args.task),
        steps=args.steps,
        seed=args.seed,
        device=_device(args.device),
        learning_rate=args.lr,
        init_scale=args.init_scale,
        policy=args.policy,
        picture=picture_path(Path(args.out), "demo.png"),
        threads=args.threads,
        quick=args.quick,
        numerics=args.numerics,
        energy=args.energy,
    )


def need_extras(modules: tuple[str, ...], who: str) -> None:
    """Raise `DemoError` if one of ``modules`` is missing."""
    missing = [module for module in modules if importlib.util.find_spec(module) is None]
    need(not missing, f'{who} {", ".join(missing)}, not installed here: pip install "fusedamp[demo]"')


def need(condition: bool, message: str) -> None:
    """Raise `DemoError` unless ``condition``."""
    if not condition:
        raise DemoError(message)


def _text_file(name: str | None, task: str) -> Path | None:
    if name is None:
        return None
    need(task != "digits", "--data is text for the GPT; --task digits reads none")
    path = Path(name)
    need(path.is_file(), f"--data {name}: no such file")
    size = path.stat().st_size
    need(size >= MIN_TEXT_BYTES, f"--data {name} holds {size} bytes; the GPT needs at least {MIN_TEXT_BYTES}")
    return path


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise DemoError(f"--device {name}: unknown; use auto, cpu, cuda or cuda:N") from None
    need(device.type in ("cpu", "cuda"), f"--device {name}: the demo runs on cpu and cuda only")
    if device.type == "cuda":
        need(
            torch.cuda.is_available(),
            f"--device {name}: torch {torch.__version__} sees no CUDA GPU here; use cpu",
        )
        count = torch.cuda.device_count()
        need((device.index or 0) < count, f"--device {name}: torch sees {count} GPU(s), numbered from 0")
    return device


def picture_path(path: Path, name: str) -> Path:
    """Return ``path``, or ``name`` in it if it is a folder, which is created."""
    if path.suffix.lower() == ".png":
        need(path.parent.is_dir(), f"--out {path}: no folder {path.parent}")
        return path
    need(path.is_dir() or not path.suffix, f"--out {path}: the plot is a PNG; name a .png file or a folder")
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DemoError(f"--out {path}: cannot create this folder ({error.strerror})") from None
    return path / name
