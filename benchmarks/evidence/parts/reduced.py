"""Every kernel, on lists small enough for a sanitizer: odd sizes, misaligned views, skips, infinities."""

from __future__ import annotations

import torch
from fusedamp import ops

from ..borrowed import copies, differing, op_calls
from ..place import Place

SIZES = [(), (0,), (1,), (3,), (7,), (255,), (257,), (16_385,)]


def run(place: Place) -> None:
    device = place.device
    for variant in place.sized(list(op_calls.VARIANTS), ["adamw", "sgd"]):
        for masters in (False, True):
            dtypes = op_calls.HALVES if masters else op_calls.DTYPES
            cpu = op_calls.step_call(variant, [s for s in SIZES for _ in dtypes], dtypes, masters=masters)
            for misaligned in (False, True):
                moved = cpu.map(copies(device, misaligned), lambda scalar: scalar.clone().to(device))
                call, wanted = moved, cpu.clone()
                for skip in (0.0, 1.0):
                    call.options["found_inf"] = torch.tensor(skip, device=device)
                    call.run()
                wanted.run()
                found = differing(wanted.exact_tensors(), call.exact_tensors())
                place.check(
                    f"{variant} masters={masters} misaligned={misaligned}", not found, "; ".join(found[:2])
                )
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
