"""One row set up in memory: both sides with the same weights and gradients, and a check that they agree."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .contenders import DTYPES, INIT_SCALE, Fusedamp, torch_side
from .rows import Row
from .workloads import Shapes, numel

EPS = torch.finfo(torch.float32).eps
STEP_ROUNDINGS = 32  # upper bound per side and update: about 12 operations, the gradient's copies, the scale
NO_CLIPPING = 1e6
NOISE = 1 << 20


class WrongResult(Exception):
    """The sides of a row disagree, so their times are meaningless."""


@dataclass(frozen=True)
class Agreement:
    difference: float
    """The largest |ours - theirs| over all FP32 weights."""
    tolerance: float


class Duel:
    """``ours`` and ``theirs``, ready to run. Weights and gradients are slices of one block of noise, so that
    only memory that a user would also have is allocated."""

    def __init__(self, row: Row, shapes: Shapes, max_norm: float = NO_CLIPPING) -> None:
        self.row, self.shapes = row, shapes
        self._noise = torch.randn(NOISE + 4096, generator=torch.Generator().manual_seed(0))
        self._noise_16 = self._noise.to(DTYPES[row.dtype])
        self.grads = [torch.empty(shape, dtype=DTYPES[row.dtype]) for shape in shapes]
        self.refill()
        self.ours = Fusedamp(row.optimizer, self._starts(), self.grads, max_norm)
        self.theirs = torch_side(row.rival, row.optimizer, self._starts(), self.grads, max_norm)
        self.steps = 0

    def refill(self, seed: int = 0) -> None:
        """Write new scaled gradients, as a backward pass would. ``seed`` selects them."""
        for index, grad in enumerate(self.grads):
            self._fill(grad, index + 7 * seed)

    def both(self) -> None:
        """Run one step of each side, untimed."""
        for side in (self.ours, self.theirs):
            self.refill()
            side.phase()
        self.steps += 1

    def agreement(self, norm_roundings: int = 0) -> Agreement:
        """Return the difference of the FP32 weights, and its bound from rounding errors.

        Per step and side a weight is rounded once, and its update has the error of at most STEP_ROUNDINGS
        roundings, plus those of the norm if it clips. 16-bit weights must equal their rounded masters: no
        tolerance.
        """
        difference = largest = travel = 0.0
        for index, (our, their) in enumerate(zip(self.ours.masters(), self.theirs.masters(), strict=True)):
            start = self._start(index).float()
            difference = max(difference, _top(our - their))
            largest = max(largest, _top(their))
            travel = max(travel, _top(their - start))
        for side in (self.ours, self.theirs):
            for weight, master in zip(side.weights, side.masters(), strict=True):
                if not torch.equal(weight.detach(), master.to(weight.dtype)):
                    raise WrongResult(f"{self.row.name}: a weight differs from its rounded master")
        if not travel > 0:
            raise WrongResult(f"{self.row.name}: the weights did not move")
        roundings = STEP_ROUNDINGS + norm_roundings
        return Agreement(difference, EPS * max(self.steps, 1) * (2 * largest + roundings * travel))

    def _start(self, index: int) -> Tensor:
        weight = torch.empty(self.shapes[index], dtype=DTYPES[self.row.dtype])
        self._fill(weight, 31 + index)
        return weight.mul_(0.05)

    def _starts(self) -> list[Tensor]:
        return [self._start(index) for index in range(len(self.shapes))]

    def _fill(self, tensor: Tensor, offset: int) -> None:
        offset = offset * 977 % 4096
        for part in tensor.view(-1).split(NOISE):
            part.copy_(self._noise_16[offset : offset + part.numel()])


def _top(tensor: Tensor) -> float:
    top = tensor.abs().max().item()
    return float("inf") if top != top else top  # Python's max() would lose a NaN


def agreed(duel: Duel, agreement: Agreement) -> Agreement:
    """Return ``agreement``, or raise WrongResult."""
    if not agreement.difference <= agreement.tolerance:
        raise WrongResult(
            f"{duel.row.name}: FP32 weights differ by up to {agreement.difference:.3g} after {duel.steps} "
            f"steps; rounding explains {agreement.tolerance:.3g}"
        )
    return agreement


def check_small(row: Row, shapes: Shapes) -> Agreement:
    """Run both sides for five steps, with clipping and an overflow in the third; raises WrongResult.

    The shapes are the workload's first ones, cut to at most 1,000 elements.
    """
    small: Shapes = [(min(1_000, torch.Size(shape).numel()),) for shape in shapes[:30]]
    expected_norm = numel(small) ** 0.5 / INIT_SCALE
    duel = Duel(row, small, max_norm=expected_norm / 2)
    for step in range(5):
        for side in (duel.ours, duel.theirs):
            duel.refill(seed=step)
            if step == 2:
                duel.grads[-1].view(-1)[-1] = float("inf")
            side.phase()
    duel.steps = 5
    scales = duel.ours.scaler.get_scale(), duel.theirs.scaler.get_scale()
    if not scales[0] == scales[1] == INIT_SCALE / 2:
        raise WrongResult(
            f"{row.name}: after an overflow the loss scales are {scales}; expected both to be halved"
        )
    # torch sums squares in FP32, in 8 lanes or more, then over tensors.
    return agreed(duel, duel.agreement(norm_roundings=1_000 // 8 + len(small)))
