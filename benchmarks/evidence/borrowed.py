"""What the tests know already: rows of optimizers, random calls of the ops, comparisons to the bit."""

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

# How else masters and states may be kept: name -> options; for weights of 16 bits, and of 32.
# Both sides of a comparison draw alike: the seed is given.
COMPRESSED: dict[str, dict[str, Any]] = {
    "split": {"master_weights": "split"},
    "split, BF16 states": {"master_weights": "split", "state_dtype": "bfloat16", "rounding_seed": 0},
    "split, 8-bit states": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 0},
    "8-bit states, rounded at random": {
        "rounding_seed": 0,
        "master_weights": "none",
        "state_dtype": "int8",
        "stochastic_rounding": True,
    },
}


def compressible(case: cases.Case) -> bool:
    """Whether every format is for this optimizer; variants of options show nothing new in them."""
    return case in cases.MAIN and not case.options.get("centered")


def copies(device: str, misaligned: bool) -> Callable[[Tensor], Tensor]:
    """Returns a function that copies tensors to ``device``; misaligned ones start 1, 2, 3, 0 ... elements off
    a boundary, so that the lists of one parameter share none."""
    turn = count(1)

    def copy(tensor: Tensor) -> Tensor:
        offset = next(turn) % 4 if misaligned else 0
        buffer = torch.empty(tensor.numel() + offset, dtype=tensor.dtype, device=device)
        return buffer[offset:].view(tensor.shape).copy_(tensor.detach(), non_blocking=True)

    return copy


def mixed(jobs: Iterable[Any]) -> list[Any]:
    """``jobs`` in an order in which those that are done in time are of every kind."""
    jobs = list(jobs)
    random.Random(0).shuffle(jobs)
    return jobs


def differing(ones: Iterable[Tensor], others: Iterable[Tensor]) -> list[str]:
    """Which of the pairs differ in a bit (any NaN equals any other), and how."""
    found = []
    for index, (one, other) in enumerate(zip(fetched(ones), fetched(others), strict=True)):
        if not (op_calls.same_bits(one, other) or op_calls.same_numbers(one, other)):
            where = (one != other) & ~(one.isnan() & other.isnan())
            first = where.reshape(-1).nonzero()[:1].tolist()
            found.append(f"tensor {index} {list(one.shape)} {one.dtype}: {int(where.sum())} from {first}")
    return found
