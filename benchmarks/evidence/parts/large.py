"""Tensors of more than 2^31 elements, and a list with more elements only in total.

They repeat a pattern, so the result must repeat the pattern's result, which the CPU computes. Every element
is compared.
"""

from __future__ import annotations

import gc

import torch
from fusedamp import ops
from torch import Tensor

from ..borrowed import op_calls
from ..place import Place, Skip

PERIOD, TINY_PERIOD = (1 << 20) + 7, 1_003  # odd: each repetition has another alignment


def repeated(pattern: Tensor, numel: int, device: str) -> Tensor:
    large = torch.empty(numel, dtype=pattern.dtype, device=device)
    here = pattern.to(device)
    for start in range(0, numel, len(pattern)):
        large[start : start + len(pattern)] = here[: numel - start]
    return large


def first_difference(large: Tensor, pattern: Tensor) -> int | None:
    here = op_calls.bits(pattern.to(large.device))
    bits = op_calls.bits(large)
    unequal = torch.zeros((), dtype=torch.bool, device=large.device)
    for start in range(0, len(large), len(pattern)):
        part = bits[start : start + len(pattern)]
        unequal |= (part != here[: len(part)]).any()
    if not unequal:
        return None
    for start in range(0, len(large), len(pattern)):
        part = bits[start : start + len(pattern)]
        where = (part != here[: len(part)]).nonzero()
        if len(where):
            return start + int(where[0])
    return None


def need(place: Place, what: str, size: float) -> None:
    if place.device != "cuda":
        return
    gc.collect()
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0]
    if size > 0.95 * free:
        skipped = place.findings.get("skipped", {})
        place.note("skipped", skipped | {what: f"needs {size / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"})
        raise Skip(what)


def unscale_and_stats(place: Place, numel: int, period: int) -> None:
    pattern = torch.randn(period, generator=torch.Generator().manual_seed(1)).half()
    large = repeated(pattern, numel, place.device)
    inv_scale = torch.tensor(0.3, device=place.device)

    stats = ops.grad_stats([large], inv_scale)
    whole, rest = divmod(numel, period)
    squares = (pattern.float() * 0.3).double().square()
    wanted = float(squares.sum()) * whole + float(squares[:rest].sum())
    assert abs(float(stats.total) / wanted - 1) < 1e-4, f"norm {float(stats.total)}; expected {wanted}"
    assert float(stats.found_inf) == 0
    large[-1] = float("nan")
    large[numel // 2] = float("inf")
    assert ops.grad_stats([large], inv_scale).counts.tolist() == [[1, 1, 0]]
    large[-1], large[numel // 2] = pattern[(numel - 1) % period], pattern[numel // 2 % period]

    found_inf = torch.zeros((), device=place.device)
    ops.unscale_([large], inv_scale, found_inf)
    ops.unscale_([pattern], torch.tensor(0.3), torch.zeros(()))
    assert float(found_inf) == 0
    assert (at := first_difference(large, pattern)) is None, f"unscale_ differs at {at}"


def step(
    place: Place, variant: str, numels: list[int], period: int, masters: bool, dtype: torch.dtype
) -> None:
    cpu = op_calls.step_call(variant, [(period,)], dtype, masters=masters)
    gpu = cpu.map(lambda tensor: tensor)
    for name in ("params", "grads", "masters"):
        setattr(gpu, name, [repeated(t, n, place.device) for n in numels for t in getattr(cpu, name)])
    gpu.states = [[repeated(t, n, place.device) for n in numels for t in one] for one in cpu.states]
    gpu.steps = [cpu.steps[0].to(place.device).clone() for _ in numels]
    for call in (gpu, cpu):
        call.run()
    for name, tensors in gpu.lists().items():
        if name in ("steps", "grads") or not tensors:
            continue
        for tensor in tensors:
            at = first_difference(tensor, cpu.lists()[name][0])
            assert at is None, f"{variant}: {name} differs at {at} of {len(tensor)}"


def run(place: Place) -> None:
    numel, period = place.sized((1 << 31) + 4_099, 70_001), place.sized(PERIOD, TINY_PERIOD)
    jobs = {
        "unscale_ and grad_stats, FP16": (3 * 2, lambda: unscale_and_stats(place, numel, period)),
        "sgd_ on BF16 weights": (
            2 * 2 + 1,
            lambda: step(place, "sgd", [numel], period, False, torch.bfloat16),
        ),
        "adamw_, BF16 with masters": (
            4 + 12 + 1,
            lambda: step(place, "adamw", [numel], period, True, torch.bfloat16),
        ),
        "adamw_, three tensors of 2^30 elements, BF16 without masters": (
            1.5 * (4 + 8) + 1,
            lambda: step(place, "adamw", [numel // 2] * 3, period, False, torch.bfloat16),
        ),
    }
    done = []
    for what, (bytes_each, job) in jobs.items():
        try:
            with place.attempt(what):
                need(place, what, bytes_each * numel)
                job()
                done.append(what)
        except Skip:
            continue
    place.note("numel", numel)
    place.note("done", done)
    if not done and not place.failures:
        raise Skip("too little device memory for any test")
