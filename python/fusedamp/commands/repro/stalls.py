"""Stalled values: updates and averages that rounding to 16-bit formats loses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fusedamp import optim
from fusedamp.amp.grad_scaler import GradScaler
from fusedamp.commands.demo.options import DTYPES
from fusedamp.optim.core.options import STORAGE

WEIGHT_STEPS = 1000
BETA2 = 0.999
OVERFLOWS = 166
STATE_NAMES: dict[Any, str] = {
    "float32": "FP32 states",
    "bfloat16": "BF16 states",
    "int8": "8-bit states",
}
ELEMENTS = 256  # the mean is shown: stochastic rounding is unbiased


@dataclass(frozen=True)
class Stall:
    """The final value of a number and its expected value. If ``ours``, they must agree within
    ``tolerance``."""

    story: str
    who: str
    wanted: float
    got: float
    ours: bool
    tolerance: float

    @property
    def arrived(self) -> bool:
        return abs(self.got - self.wanted) <= self.tolerance * abs(self.wanted)


def stalls(steps: int) -> Iterator[Stall]:
    """Run all tests; ``steps`` is for the second moment, which averages over a thousand."""
    yield from _weights()
    yield from _second_moments(steps)
    yield from _scales()


def _stepped(make: Callable[..., Any], dtype: torch.dtype, start: float, steps: int, **options: Any) -> Any:
    """Return the parameter and its optimizer after ``steps`` gradients of 1."""
    param = torch.nn.Parameter(torch.full((ELEMENTS,), start, dtype=dtype))
    param.grad = torch.ones_like(param)
    optimizer = make([param], **options)
    for _ in range(steps):
        optimizer.step()
    return param, optimizer


def as_fp32(optimizer: torch.optim.Optimizer, param: Tensor, name: str) -> Tensor:
    """Return the state ``name`` of AdamW's only parameter, converted from any format to FP32."""
    wide = optim.AdamW([param])
    wide.load_state_dict(optimizer.state_dict())
    state: Tensor = wide.state[param][name]
    return state


def _weights() -> Iterator[Stall]:
    """Step Adam at lr 1e-4, which moves a weight by 1e-4: less than half a unit in the last place of 1."""
    story = f"{WEIGHT_STEPS} steps of 1e-4 down from 1.0"
    options = {"lr": 1e-4, "weight_decay": 0.0}
    wanted = _stepped(optim.AdamW, torch.float32, 1.0, WEIGHT_STEPS, **options)[0].double().mean().item()
    for name in ("fp16", "bf16"):
        dtype, weights = DTYPES[name], f"{name.upper()} weight"
        # The rounded weight is exact to half a unit in the last place.
        shown = torch.finfo(dtype).eps / 2
        got = (
            _stepped(torch.optim.AdamW, dtype, 1.0, WEIGHT_STEPS, fused=True, **options)[0]
            .double()
            .mean()
            .item()
        )
        yield Stall(story, f"torch, fused, {weights}", wanted, got, False, shown)
        for masters in STORAGE["master_weights"]:
            kept = {**options, "master_weights": masters}
            got = _stepped(optim.AdamW, dtype, 1.0, WEIGHT_STEPS, **kept)[0].double().mean().item()
            who = f'fusedamp, {weights}, master_weights="{masters}"'
            yield Stall(story, who, wanted, got, masters != "none", shown)


def _second_moments(steps: int) -> Iterator[Stall]:
    """Average over 1 / (1 - beta2) gradients, in each state format."""
    story = f"second moment after {steps} gradients of 1, beta2 = {BETA2}"
    wanted = 1 - BETA2**steps
    for name in ("fp32", "bf16"):
        options = {"lr": 0.0, "betas": (0.9, BETA2), "fused": True}
        param, optimizer = _stepped(torch.optim.AdamW, DTYPES[name], 0.0, steps, **options)
        got = optimizer.state[param]["exp_avg_sq"].double().mean().item()
        yield Stall(story, f"torch, fused, {name.upper()} state", wanted, got, False, 0.01)
    for states in STORAGE["state_dtype"]:
        param, optimizer = _stepped(
            optim.AdamW, torch.bfloat16, 0.0, steps, lr=0.0, betas=(0.9, BETA2), state_dtype=states
        )
        got = as_fp32(optimizer, param, "exp_avg_sq").double().mean().item()
        who = f"fusedamp, BF16 weight, {STATE_NAMES[states]}"
        yield Stall(story, who, wanted, got, True, 0.01)


def _scales() -> Iterator[Stall]:
    """Measure the loss scale after many overflows, and the weight after the next good step."""
    story = f"loss scale after {OVERFLOWS} overflows in a row from 2^16"
    for who, kind in (("torch", torch.amp.GradScaler), ("fusedamp", GradScaler)):
        param = torch.nn.Parameter(torch.ones(1))
        optimizer = torch.optim.SGD([param], lr=1.0)
        scaler = kind("cpu", init_scale=2.0**16)
        scaler.scale(torch.ones(()))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # ours warns at its floor
            for _ in range(OVERFLOWS):
                param.grad = torch.full((1,), torch.inf)
                scaler.step(optimizer)
                scaler.update()
        alive = scaler.get_scale() > 0
        yield Stall(story, f"{who}: is it above 0?", 1.0, float(alive), who == "fusedamp", 0.0)
