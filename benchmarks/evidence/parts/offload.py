"""Offload: the bits of the step without it while copies overlap, the bus, memory and training steps."""

from __future__ import annotations

import gc
from typing import Any

import torch
from fusedamp import GradScaler, optim
from fusedamp.optim.offload.link import link_to
from torch import Tensor

from ..clock import Clock
from ..place import Place
from .training import GPT2, OPTIONS, TINY, Recipe, ours, train

FORMATS: dict[str, dict[str, Any]] = {
    "FP32 masters and states": {},
    "split, BF16 states": {"master_weights": "split", "state_dtype": torch.bfloat16, "rounding_seed": 3},
    "split, 8-bit states": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3},
}
STEPS, SKIPPED = 20, 7


def slope(like: Tensor, seed: int) -> Tensor:
    """Return the gradient of a step, exact in the dtype of ``like``."""
    generator = torch.Generator(like.device).manual_seed(seed)
    made = torch.randn(like.shape, device=like.device, generator=generator).mul_(0.1)
    return made.to(like.dtype)


def prove(place: Place, name: str, options: dict[str, Any]) -> None:
    """Compare with a plain optimizer on the same device through backward passes, clipping and an overflow."""
    sizes = place.sized([(4_096, 4_096), (50_000_001,), (77,), ()] + [(1_000, 3)] * 40, [(64, 8), (77,), ()])
    torch.manual_seed(0)
    starts = [torch.randn(size, device=place.device).bfloat16() for size in sizes]
    sides = []
    for make in (optim.AdamW, lambda some, **given: optim.Offloaded(optim.AdamW, some, **given)):
        params = [torch.nn.Parameter(start.clone()) for start in starts]
        sides.append((params, make(params, **OPTIONS, **options), GradScaler(place.device, init_scale=16.0)))
    for step in range(STEPS):
        for params, optimizer, scaler in sides:
            for micro in range(2):
                loss = torch.stack(
                    [(p * slope(p, 100 * step + 10 * i + micro)).float().sum() for i, p in enumerate(params)]
                )
                if step == SKIPPED and micro:
                    loss[0] = loss[0] * torch.inf
                scaler.scale(loss.sum()).backward()
            if step % 2:
                scaler.clip_grad_norm_(optimizer, 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if step in (0, SKIPPED, STEPS - 1):
            pairs = zip(sides[0][0], sides[1][0], strict=True)
            same = all(torch.equal(p, q) for p, q in pairs)
            place.check(f"{name}: the same weights after step {step}", same)
    place.check(f"{name}: one step was skipped", int(sides[1][1].state[sides[1][0][0]]["step"]) == STEPS - 1)


def bus(place: Place, clock: Clock) -> dict[str, float]:
    """Return the GB/s of a bucket in each direction, and of both at once."""
    size = place.sized(32 << 20, 1 << 12)
    link = link_to(torch.device(place.device, 0) if place.device == "cuda" else torch.device("cpu"))
    hosts = [link.host_bytes(size) for _ in range(2)]
    devices = [torch.empty(size, dtype=torch.uint8, device=place.device) for _ in range(2)]

    def move(*directions: str) -> None:
        done = []
        for name, host, device in zip(("down", "up"), hosts, devices, strict=True):
            target, source = (host, device) if name == "down" else (device, host)
            if name in directions:
                done.append(link.run(name, lambda t=target, s=source: [link.cross(t, s) for _ in range(8)]))
        for one in done:
            link.follow(one)

    calls = {"down": lambda: move("down"), "up": lambda: move("up"), "both": lambda: move("down", "up")}
    times = clock.alternate(calls, {}, place.sized(10, 2), ahead=False)
    return {name: 8 * size * (2 if name == "both" else 1) / row["ms"] / 1e6 for name, row in times.items()}


def step_times(place: Place, clock: Clock) -> list[dict[str, Any]]:
    """Time a step of many buckets alone, with and without the copies of gradients, and the memory."""
    count, rows = place.sized(24, 3), []
    for name, options in FORMATS.items():
        shape = place.sized((4_096, 8_192), (32, 16))
        params = [
            torch.nn.Parameter(torch.zeros(shape, device=place.device, dtype=torch.bfloat16))
            for _ in range(count)
        ]
        optimizer = optim.Offloaded(optim.AdamW, params, **options)

        def arrive(params: list[Tensor] = params) -> None:
            sum((p * 1e-3).float().sum() for p in params).backward()

        def clear(optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            optimizer.last_micro_batch(False)
            arrive()

        def ready(optimizer: Any = optimizer) -> None:
            optimizer.zero_grad()
            arrive()

        calls = {"with gradients": optimizer.step, "gradients copied before": optimizer.step}
        before = {"with gradients": clear, "gradients copied before": ready}
        times = clock.alternate(calls, before, place.sized(5, 2), ahead=False)
        numel = sum(p.numel() for p in params)
        for what, row in times.items():
            rows.append(
                {
                    "format": name,
                    "step": what,
                    "numel": numel,
                    **row,
                    "ns_per_parameter": row["ms"] * 1e6 / numel,
                }
            )
        del params, optimizer, calls, before
        gc.collect()
    return rows


def run(place: Place) -> None:
    clock = Clock(place.device)
    for name, options in FORMATS.items():
        with place.attempt(f"bits, {name}"):
            prove(place, name, options)
    with place.attempt("bus"):
        place.note("bus_gb_s", bus(place, clock))
    with place.attempt("steps"):
        place.note("steps", step_times(place, clock))
    runs = []
    for name, kind in (("on the device", optim.AdamW), ("offloaded", optim.Offloaded)):

        def make(params: list[Tensor], kind: Any = kind) -> torch.optim.Optimizer:
            options = {**OPTIONS, "master_weights": "split"}
            return (
                optim.Offloaded(optim.AdamW, params, **options)
                if kind is optim.Offloaded
                else kind(params, **options)
            )

        with place.attempt(f"GPT-2, {name}"):
            recipe = Recipe(name, GradScaler, make, False, torch.float16, ours)
            runs.append(train(place, recipe, place.sized(GPT2, TINY)))
        gc.collect()
    place.note("runs", [{key: value for key, value in run.items() if key != "losses"} for run in runs])
    if len(runs) == 2:
        apart = max(abs(a - b) for a, b in zip(*(run["losses"] for run in runs), strict=True))
        place.check("GPT-2: both ways learn alike", apart < 0.05, f"losses differ by {apart:.3g}")
