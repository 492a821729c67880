"""Known errors of coarse formats of states and weights, tested with fusedamp's formats against FP32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fusedamp import optim
from fusedamp.commands.demo.options import DTYPES

from .stalls import STATE_NAMES, WEIGHT_STEPS, Stall, as_fp32

ELEMENTS = 4096
LARGE_EVERY = 16  # elements; all others have small gradients
SIGMAS = (1e-5, 1e-9)
UPDATES = 300
COARSE = [dtype for dtype in STATE_NAMES if dtype != "float32"]


def compressed(steps: int) -> Iterator[Stall]:
    """Run all tests: stochastically rounded weights without masters, and states in each non-FP32 format.
    ``steps``: number of steps for decaying averages.
    """
    yield from _rounded_weights()
    yield from _decays(steps)
    yield from _magnitudes()


def _rounded_weights() -> Iterator[Stall]:
    """Make 1,000 steps of 1e-4 from 1.0, each far below a unit in the last place: unbiased on average."""
    for name in ("fp16", "bf16"):
        param = torch.nn.Parameter(torch.ones(ELEMENTS, dtype=DTYPES[name]))
        param.grad = torch.ones_like(param)
        optimizer = optim.SGD([param], lr=1e-4, master_weights="none", stochastic_rounding=True)
        for _ in range(WEIGHT_STEPS):
            optimizer.step()
        # An element's standard deviation is sqrt(steps * 1e-4 * unit) < 0.03; that of the mean is a 64th of
        # it.
        mean = param.detach().double().mean().item()
        who = f"fusedamp, {name.upper()} weight, no master, stochastic rounding"
        yield Stall(f"{WEIGHT_STEPS} steps of 1e-4 down from 1.0", who, 0.9, mean, True, 0.003)


def _decays(steps: int) -> Iterator[Stall]:
    """Make one large gradient, then small ones in a block whose other elements stay large: v must decay."""
    ends: dict[Any, float] = {}
    large = torch.arange(ELEMENTS) % LARGE_EVERY == 0
    for state_dtype in STATE_NAMES:
        param = torch.nn.Parameter(torch.zeros(ELEMENTS))
        param.grad = torch.ones_like(param)
        optimizer = optim.AdamW([param], lr=0.0, state_dtype=state_dtype)
        for step in range(steps):
            if step == 1:
                param.grad.fill_(1e-2).masked_fill_(large, 1.0)
            optimizer.step()
        ends[state_dtype] = as_fp32(optimizer, param, "exp_avg_sq")[~large].double().mean().item()
    for state_dtype in COARSE:
        story = f"second moment of 1e-2 after one gradient of 1, {steps} steps, in a block with ones"
        who = f"fusedamp, {STATE_NAMES[state_dtype]}"
        yield Stall(story, who, ends["float32"], ends[state_dtype], True, 0.02)


def _magnitudes() -> Iterator[Stall]:
    """Measure the error of Adam's weights against FP32 states: it must be equal for tiny and small
    gradients."""
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(ELEMENTS, generator=random) for _ in range(UPDATES)]
    for state_dtype in COARSE:
        errors: list[float] = []
        for sigma in SIGMAS:
            ours, exact = _moved(grads, sigma, state_dtype), _moved(grads, sigma, "float32")
            errors.append(((ours - exact).norm() / exact.norm()).item())
        story = (
            f"relative error of {UPDATES} updates, gradients of {SIGMAS[1]:g}; expected: as at {SIGMAS[0]:g}"
        )
        wanted, got = errors
        yield Stall(story, f"fusedamp, {STATE_NAMES[state_dtype]}", wanted, got, True, 0.3)


def _moved(grads: list[Tensor], sigma: float, state_dtype: Any) -> Tensor:
    param = torch.nn.Parameter(torch.zeros(ELEMENTS))
    param.grad = torch.zeros(ELEMENTS)
    optimizer = optim.Adam([param], lr=1.0, betas=(0.9, 0.99), eps=1e-20, state_dtype=state_dtype)
    for grad in grads:
        param.grad.copy_(grad * sigma)
        optimizer.step()
    return param.detach().double()
