"""Shared with the tests: rows of optimizers, random op calls, bitwise comparisons."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable
from itertools import count
from typing import Any

import torch
from torch import Tensor

from .process import ROOT

sys.path.insert(0, str(ROOT / "tests/shared"))

import cases
import on_device
import op_calls
from on_device import fetched

__all__ = ["COMPRESSED", "cases", "compressible", "copies", "differing", "mixed", "on_device", "op_calls"]

# Storage formats of masters and states: name -> options; for 16-bit and for 32-bit weights. A fixed seed:
# both sides of a comparison draw the same random numbers.
COMPRESSED: dict[str, dict[str, Any]] = {
    "split": {"master_weights": "split"},
    "split, BF16 states": {"master_weights": "split", "state_dtype": "bfloat16", "rounding_seed": 0},
    "split, 8-bit states": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 0},
    "8-bit states, stochastic rounding": {
        "rounding_seed": 0,
        "master_weights": "none",
        "state_dtype": "int8",
        "stochastic_rounding": True,
    },
}


def compressible(case: cases.Case) -> bool:
    """True if this optimizer is tested in every format; variants of options add nothing."""
    return case in cases.MAIN and not case.options.get("centered")


def copies(device: str, misaligned: bool) -> Callable[[Tensor], Tensor]:
    """Return a function that copies tensors to ``device``; misaligned copies start 1, 2, 3, 0 ... elements
    after a boundary, so that the lists of one parameter have no common alignment."""
    turn = count(1)

    def copy(tensor: Tensor) -> Tensor:
        offset = next(turn) % 4 if misaligned else 0
        buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
        return buffer[offset:].view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    return copy


def mixed(jobs: Iterable[Any]) -> list[Any]:
    """Shuffle ``jobs``, so that a time limit omits some of every kind."""
    jobs = list(jobs)
    random.Random(0).shuffle(jobs)
    return jobs


def differing(ones: Iterable[Tensor], others: Iterable[Tensor]) -> list[str]:
    """Describe the pairs that differ in a bit (any NaN equals any other)."""
    found = []
    for index, (one, other) in enumerate(zip(fetched(ones), fetched(others), strict=True)):
        if not (op_calls.same_bits(one, other) or op_calls.same_numbers(one, other)):
            where = (one != other) & ~(one.isnan() & other.isnan())
            first = where.reshape(-1).nonzero()[:1].tolist()
            found.append(f"tensor {index} {list(one.shape)} {one.dtype}: {int(where.sum())} from {first}")
    return found
