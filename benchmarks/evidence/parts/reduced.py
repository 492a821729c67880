"""Runs every kernel once on lists small enough for a sanitizer: odd sizes, misaligned, skips, infinities."""

from __future__ import annotations

from itertools import cycle
from typing import Any

import torch
from fusedamp import ops
from torch import Tensor

from ..borrowed import COMPRESSED, cases, compressible, copies, differing, mixed, op_calls
from ..place import Place

SIZES = [(0,), (), (7,), (257,), (16_385,)]
# One variant per rule: other options use the same kernels.
RULES = """
    adamw adamw-amsgrad adam adam-amsgrad sgd sgd-momentum lion adagrad radam nadam lamb lars novograd
    rmsprop rmsprop-momentum rmsprop-centered rmsprop-centered-momentum
"""


def run(place: Place) -> None:
    with place.attempt("reads"):
        reads(place)
    rules = place.sized(RULES.split(), ["adamw", "sgd"])
    compressed = [case for case in place.sized(cases.MAIN, cases.MAIN[:1]) if compressible(case)]
    formats = cycle(COMPRESSED.items())
    jobs = [(step, variant, index % 2 == 0) for index, variant in enumerate(rules)]
    jobs += [(in_format, case, *next(formats)) for case in compressed]
    jobs += [(in_format, cases.MAIN[0], *item) for item in list(COMPRESSED.items())[1:]]
    jobs = mixed(jobs)
    for done, (job, *arguments) in enumerate(place.all_in_time(jobs), start=1):
        with place.attempt(" ".join(str(argument) for argument in arguments)):
            job(place, *arguments)
        place.note("jobs_done", f"{done} of {len(jobs)}")


def in_format(place: Place, case: cases.Case, name: str, storage: dict[str, Any]) -> None:
    """Compare a step with the CPU's; rules with norms of whole tensors only have to stay within memory."""
    ends: list[list[Tensor]] = []
    for device in ("cpu", place.device):
        params = cases.make_params(torch.bfloat16, SIZES)
        cases.set_grads(params, 0)
        grads = [param.grad.to(device) for param in params]
        params = [torch.nn.Parameter(param.detach().to(device)) for param in params]
        optimizer = case.ours(params, **case.options, **storage)
        for param, grad in zip(params, grads, strict=True):
            param.grad = grad
        optimizer.step()
        entries = optimizer.state_dict()["state"].values()
        states = [v for entry in entries for _, v in sorted(entry.items()) if isinstance(v, Tensor)]
        ends.append([*params, *(states if case.bitwise else [])])
    if case.bitwise:
        assert not (found := differing(*ends)), "; ".join(found[:2])
    assert all(bool(param.isfinite().all()) for param in ends[1][: len(SIZES)])


def step(place: Place, variant: str, misaligned: bool) -> None:
    """Step with masters, and without, which includes FP64 tensors with their own kernels."""
    for masters, dtypes in ((False, op_calls.DTYPES), (True, op_calls.HALVES)):
        sizes = SIZES + [SIZES[-1]] * (len(dtypes) - 1)  # one with several chunks per dtype
        wanted = op_calls.step_call(variant, sizes, dtypes, masters=masters)
        call = wanted.map(copies(place.device, misaligned), lambda scalar: scalar.clone().to(place.device))
        for skip in (0.0, 1.0):
            call.options["found_inf"] = torch.tensor(skip, device=place.device)
            call.run()
        wanted.run()
        found = differing(wanted.exact_tensors(), call.exact_tensors())
        assert not found, f"masters={masters}: {'; '.join(found[:2])}"


def reads(place: Place) -> None:
    device = place.device
    copy = copies(device, True)
    grads = [copy(torch.randn(size).to(dtype)) for dtype in op_calls.DTYPES for size in SIZES]
    for norm_type in (2.0, float("inf"), 3.0):
        ops.grad_stats(grads, torch.tensor(0.5, device=device), norm_type)
    for last in grads[len(SIZES) - 1 :: len(SIZES)]:
        last[5] = float("inf")
    stats = ops.grad_stats(grads)
    found_inf = torch.zeros((), device=device)
    ops.unscale_(grads, torch.tensor(0.5, device=device), found_inf)
    flags = [float(found_inf), float(stats.found_inf), int(stats.counts[:, 0].sum())]
    place.check("an infinity in each dtype", flags == [1, 1, len(op_calls.DTYPES)], str(flags))
    scale, tracker = torch.ones((), device=device), torch.zeros((), dtype=torch.int32, device=device)
    factors = dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=1)
    ops.update_scale_(scale, tracker, torch.zeros((), device=device), **factors)
    place.check("update_scale_", float(scale) == 2.0, str(scale))
