"""Joules per sample of a training step of GPT-2 size in FP32, TF32, FP16 and BF16, by the GPU's counter."""

from __future__ import annotations

import time
from collections.abc import Callable

import fusedamp
import torch
from fusedamp import energy
from fusedamp.energy.comparison import measured, quartiles
from fusedamp.energy.counter import Counter
from fusedamp.energy.devices import counters_of
from torch import Tensor
from torch.nn import functional

from ..place import Place, Skip
from .training import OPTIONS, TINY, Model, Size, torch_fused

GPT2 = Size(50_304, 512, 768, 12, 12, 4, 0)
ROUNDS = 4
MOST_WATTS = 3_000  # of one GPU; more is an error of units


class Arm:
    """A step on the same batch: FP32 and TF32 with torch's AdamW, 16-bit weights with fusedamp's."""

    def __init__(self, place: Place, size: Size, dtype: torch.dtype, tf32: bool = False) -> None:
        torch.manual_seed(0)
        self.model = Model(size).to(place.device, dtype)
        self.precision = "high" if tf32 else "highest"
        params, wide = list(self.model.parameters()), dtype == torch.float32
        self.optimizer = torch_fused(params) if wide else fusedamp.optim.AdamW(params, **OPTIONS)
        self.scaler = fusedamp.GradScaler(place.device, init_scale=2.0**12, enabled=dtype == torch.float16)
        shape = (size.batch, size.context + 1)
        self.tokens = torch.randint(size.vocabulary, shape, device=place.device)
        self.loss: Tensor = torch.zeros(())

    def __call__(self) -> None:
        torch.set_float32_matmul_precision(self.precision)
        logits = self.model(self.tokens[:, :-1]).float()
        loss = functional.cross_entropy(logits.flatten(0, 1), self.tokens[:, 1:].flatten())
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.loss = loss.detach()


class Pretended(Counter):
    """A counter for rehearsals: 100 W, whatever runs."""

    name = "pretended"

    def joules(self) -> float:
        return 100 * time.monotonic()


def counters(place: Place) -> list[Counter]:
    if place.rehearse:
        return [Pretended()]
    try:
        return counters_of("energy", ["cuda:0"])
    except energy.EnergyError as error:
        raise Skip(str(error)) from None


def run(place: Place) -> None:
    counted = counters(place)
    size = place.sized(GPT2, TINY)
    place.note("size", vars(size))
    before = torch.get_float32_matmul_precision()
    arms: dict[str, Callable[[], None]] = {
        "FP32": Arm(place, size, torch.float32),
        "TF32": Arm(place, size, torch.float32, tf32=True),
        "FP16": Arm(place, size, torch.float16),
        "BF16": Arm(place, size, torch.bfloat16),
    }
    try:
        compared = measured(arms, counted, size.batch, place.sized(2.0, 0.05), ROUNDS)
    finally:
        torch.set_float32_matmul_precision(before)
    rows = []
    for name, arm in compared.arms.items():
        low, joules, high = quartiles(arm.joules_per_sample)
        watts = quartiles(arm.watts)[1]
        rows.append(
            {
                "arm": name,
                "joules_per_sample": joules,
                "low": low,
                "high": high,
                "ms_per_sample": 1e3 * quartiles(arm.seconds_per_sample)[1],
                "watts": watts,
                "celsius": max(arm.temperatures.values(), default=None),
                "rounds": arm.joules_per_sample,
            }
        )
        place.check(f"{name}: power", 1 < watts < MOST_WATTS, f"{watts} W")
        loss = float(arms[name].loss)  # type: ignore[attr-defined]
        place.check(f"{name}: loss", loss == loss, f"loss {loss}")
    place.note("arms", rows)
    place.note("verdicts", [compared.verdict("FP32", name) for name in list(arms)[1:]])
    place.note("others", compared.others)
