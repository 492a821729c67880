"""Every kernel, on lists small enough for a sanitizer: odd sizes, misaligned views, skips, infinities."""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from fusedamp import ops

from ..borrowed import COMPRESSED, cases, copies, differing, op_calls
from ..place import Place
from .bitwise import through_the_scaler

SIZES = [(), (0,), (1,), (3,), (7,), (255,), (257,), (16_385,)]


def run(place: Place) -> None:
    reads(place)
    names = place.sized(["adamw", "lion", "adam-amsgrad", "lamb", "nadam"], ["adamw"])
    compressed = [(cases.BY_NAME[name], key) for key in COMPRESSED for name in names]
    for case, key in place.all_in_time(compressed):
        with place.attempt(f"{case.name} {key}"):
            in_format(place, case, COMPRESSED[key])
    calls = product(place.sized(list(op_calls.VARIANTS), ["adamw", "sgd"]), (True, False), (True, False))
    for variant, masters, misaligned in place.all_in_time(calls):
        step(place, variant, masters, misaligned)


def in_format(place: Place, case: cases.Case, storage: dict[str, Any]) -> None:
    """Two steps beside the CPU's; norms of whole tensors only have to stay within memory."""
    if case.bitwise:
        return through_the_scaler(place, case, torch.bfloat16, storage, steps=2)
    params = [torch.nn.Parameter(p.detach().to(place.device)) for p in cases.make_params(torch.bfloat16)]
    optimizer = case.ours(params, **case.options, **storage)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert all(bool(p.isfinite().all()) for p in params)


def step(place: Place, variant: str, masters: bool, misaligned: bool) -> None:
    device, dtypes = place.device, op_calls.HALVES if masters else op_calls.DTYPES
    wanted = op_calls.step_call(variant, [s for s in SIZES for _ in dtypes], dtypes, masters=masters)
    call = wanted.map(copies(device, misaligned), lambda scalar: scalar.clone().to(device))
    for skip in (0.0, 1.0):
        call.options["found_inf"] = torch.tensor(skip, device=device)
        call.run()
    wanted.run()
    found = differing(wanted.exact_tensors(), call.exact_tensors())
    place.check(f"{variant} masters={masters} misaligned={misaligned}", not found, "; ".join(found[:2]))


def reads(place: Place) -> None:
    device = place.device
    for dtype in op_calls.DTYPES:
        grads = [copies(device, True)(torch.randn(size).to(dtype)) for size in SIZES]
        for norm_type in (2.0, float("inf"), 3.0):
            ops.grad_stats(grads, torch.tensor(0.5, device=device), norm_type)
        grads[-1][5] = float("inf")
        stats = ops.grad_stats(grads)
        found_inf = torch.zeros((), device=device)
        ops.unscale_(grads, torch.tensor(0.5, device=device), found_inf)
        flags = [float(found_inf), float(stats.found_inf), int(stats.counts[-1, 0])]
        place.check(f"an infinity in {dtype}", flags == [1, 1, 1], str(flags))
    scale, tracker = torch.ones((), device=device), torch.zeros((), dtype=torch.int32, device=device)
    factors = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=1)
    ops.update_scale_(scale, tracker, torch.zeros((), device=device), **factors)
    place.check("update_scale_", float(scale) == 2.0, str(scale))
