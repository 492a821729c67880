"""Watches: counts of CPU and CUDA, training with the same bits, records of replayed graphs, and the cost."""

from __future__ import annotations

from typing import Any

import torch
from fusedamp import GradScaler, numerics, ops, optim
from torch import Tensor

from ..clock import Clock
from ..place import Place

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
SIZES = [(1,), (7,), (33, 31), (4_097,), (0,), (1_000_003,)]
FORMATS: dict[str, dict[str, Any]] = {
    "FP32 masters": {},
    "split masters, 8-bit states": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3},
    "no masters": {"master_weights": "none"},
}
STEPS, SKIPPED, EVERY = 24, 8, 4


def spread(size: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """Return values of many binades on the CPU, with zeros, and one infinity in every third tensor."""
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(size, generator=draw) * (torch.randn(size, generator=draw) * 12).exp2()
    values[torch.rand(size, generator=draw) < 0.1] = 0.0
    if seed % 3 == 0 and values.numel():
        values.view(-1)[-1] = torch.inf
    return values.to(dtype)


def counts(place: Place, dtype: torch.dtype) -> None:
    here = [spread(size, dtype, seed) for seed, size in enumerate(SIZES)]
    found = []
    for device in ("cpu", place.device):
        grads, n = [grad.to(device) for grad in here], len(here)
        for due in (0, 1):
            extremes = torch.full((n, 3), -1.0, dtype=torch.float64, device=device)
            histogram = torch.full((n, 64), -1, device=device)
            flag = torch.full((), due, dtype=torch.int32, device=device)
            scale = torch.full((), 0.25, device=device)
            stats = ops.grad_numerics(grads, extremes, histogram, flag, inv_scale=scale)
            plain = ops.grad_stats(grads, scale)
            same = all(torch.equal(a, b) or bool((a != a).any()) for a, b in zip(stats, plain, strict=True))
            place.check(f"{dtype} on {device}: the results of grad_stats", same)
            found.append((extremes.cpu(), histogram.cpu()))
    for due in (0, 1):
        (a, b), (c, d) = found[due], found[2 + due]
        place.check(f"{dtype}: counts are equal, due {due}", torch.equal(a, c) and torch.equal(b, d))


class Side:
    def __init__(self, device: str, dtype: torch.dtype, options: dict[str, Any], watched: bool) -> None:
        draw = torch.Generator().manual_seed(0)
        sizes = [(300, 300), (77,), (), (5_000,)]
        self.params = [torch.nn.Parameter(torch.randn(s, generator=draw).to(device, dtype)) for s in sizes]
        for param in self.params:
            param.grad = torch.zeros_like(param)
        self.optimizer = optim.AdamW(self.params, lr=1e-3, capturable=True, **options)
        self.scaler = GradScaler(device, init_scale=64.0)
        self.scaler.scale(torch.ones((), device=device))
        made = numerics.watch(self.optimizer, self.scaler, every=EVERY) if watched else None
        self.watch = made

    def feed(self, step: int) -> None:
        draw = torch.Generator().manual_seed(step)
        for param in self.params:
            assert param.grad is not None
            param.grad.copy_(torch.randn(param.shape, generator=draw))
        if step == SKIPPED:
            self.params[0].grad.fill_(torch.inf)  # type: ignore[union-attr]

    def iterate(self) -> None:
        self.scaler.step(self.optimizer)
        self.scaler.update()


def same(a: numerics.Record, b: numerics.Record) -> bool:
    """True if two records count the same; squares may differ in the last bits of a sum."""
    exact = ("numel", "histogram", "largest", "moved", "lost")
    pairs = [(getattr(a, name), getattr(b, name)) for name in exact]
    near = [(getattr(a, name), getattr(b, name)) for name in ("update_norm", "weight_norm")]
    return (
        (a.step, a.scale, a.skipped) == (b.step, b.scale, b.skipped)
        and all(x is y is None or torch.equal(x, y) for x, y in pairs)
        and all(x is y is None or torch.allclose(x, y, rtol=1e-6) for x, y in near)
    )


def training(place: Place, name: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Compare without a watch, with it, under a graph, and on the CPU."""
    sides = {
        "plain": Side(place.device, dtype, options, False),
        "watched": Side(place.device, dtype, options, True),
        "replayed": Side(place.device, dtype, options, True),
        "cpu": Side("cpu", dtype, options, True),
    }
    calls = {key: side.iterate for key, side in sides.items()}
    records: dict[str, list[numerics.Record]] = {key: [] for key in sides}
    for step in range(1, STEPS + 1):
        if step == EVERY and place.device == "cuda":
            sides["replayed"].feed(step)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                sides["replayed"].iterate()
            calls["replayed"] = graph.replay
        for key, side in sides.items():
            side.feed(step)
            calls[key]()
            if side.watch is not None:
                records[key] += side.watch.poll()
    if place.device == "cuda":
        torch.cuda.synchronize()
    for key, side in sides.items():
        if side.watch is not None:
            records[key] += side.watch.poll()
            kept = side.watch.collect()
            place.check(f"{name}, {key}: all records are kept", len(kept) == STEPS // EVERY, f"{len(kept)}")
            alike = all(same(a, b) for a, b in zip(kept, sides["watched"].watch.collect(), strict=True))  # type: ignore[union-attr]
            place.check(f"{name}, {key}: the same records", alike)
        equal = all(
            torch.equal(a.cpu(), b.cpu()) for a, b in zip(side.params, sides["plain"].params, strict=True)
        )
        place.check(f"{name}, {key}: the same weights as without a watch", equal)
    seen = [record.step for record in records["watched"]]
    place.check(f"{name}: polls saw every record", seen == list(range(EVERY, STEPS + 1, EVERY)), str(seen))
    skipped = [record.step for record in records["watched"] if record.skipped]
    place.check(f"{name}: the skipped step is known", skipped == [SKIPPED], str(skipped))


def costs(place: Place, clock: Clock) -> list[dict[str, Any]]:
    """Time iterations without a watch, and with one in steps that are due or not."""
    rows = []
    workloads = {
        "one tensor": place.sized([(400_000_000,)], [(5_000,)]),
        "2,000 tensors": [(place.sized(5_000, 50),)] * place.sized(2_000, 5),
    }
    ways: dict[str, dict[str, Any] | None] = {
        "plain": None,
        "not due": dict(every=10**9),
        "due, without updates": dict(every=1, updates=False),
        "due": dict(every=1),
    }
    for title, shapes in workloads.items():
        for dtype in (torch.float16, torch.bfloat16):
            calls = {}
            for way, options in ways.items():
                params = [torch.nn.Parameter(torch.ones(s, device=place.device, dtype=dtype)) for s in shapes]
                for param in params:
                    param.grad = torch.full_like(param, 1e-3)
                optimizer = optim.AdamW(params, lr=1e-4)
                scaler = GradScaler(place.device, init_scale=1.0, growth_interval=10**9)
                scaler.scale(torch.ones((), device=place.device))
                if options is not None:
                    numerics.watch(optimizer, scaler, history=1, **options)

                def iterate(optimizer: Any = optimizer, scaler: Any = scaler) -> None:
                    scaler.step(optimizer)
                    scaler.update()

                calls[way] = iterate
            times = clock.alternate(calls, {}, place.sized(20, 2), ahead=True)
            cost = {way: times[way]["ms"] / times["plain"]["ms"] for way in ways}
            rows.append(
                dict(
                    workload=title,
                    dtype=str(dtype).removeprefix("torch."),
                    plain_ms=times["plain"]["ms"],
                    cost=cost,
                    every_50=(49 * cost["not due"] + cost["due"]) / 50,
                    every_100_without_updates=(99 * cost["not due"] + cost["due, without updates"]) / 100,
                )
            )
    return rows


def run(place: Place) -> None:
    for dtype in DTYPES:
        with place.attempt(f"counts of {dtype}"):
            counts(place, dtype)
    for name, options in FORMATS.items():
        for dtype in (torch.float16, torch.bfloat16):
            with place.attempt(f"training, {name}, {dtype}"):
                training(place, f"{name}, {dtype}", dtype, options)
    with place.attempt("cost"):
        place.note("cost", costs(place, Clock(place.device)))
