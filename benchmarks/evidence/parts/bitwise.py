"""Every optimizer, combination of dtypes, storage format and odd size, aligned and not: 12 steps, bitwise
equal to the CPU.

In a rehearsal both sides run on the CPU.
"""

from __future__ import annotations

from functools import cache
from itertools import product
from typing import Any

import torch
from fusedamp import GradScaler, ops
from torch import Tensor

from ..borrowed import COMPRESSED, cases, compressible, copies, differing, mixed, op_calls
from ..place import Place

SIZES = [(), (0,), (1,), (7,), (255,), (3, 5, 7), (4_097,), (16_383,), (16_384,), (16_385,), (100_003,)]
TINY_SIZES = [(), (0,), (1,), (7,), (257,)]
STEPS, SKIPPED, WRITTEN = 12, 5, 8
# In gradient checks a thread sums at most this many terms in FP32, on either side, before it continues in
# FP64.
STATS_ROUNDINGS = 512


def run(place: Place) -> None:
    for dtype in op_calls.DTYPES:
        with place.attempt(f"unscale_ {dtype}"):
            unscale(place, dtype)
        with place.attempt(f"grad_stats {dtype}"):
            stats(place, dtype)
    with place.attempt("update_scale_"):
        scale(place)
    optimizers = place.sized([case for case in cases.CASES if case.bitwise], cases.MAIN[:1])
    jobs = [
        (case, dtype, name, storage)
        for case in optimizers
        for dtype in op_calls.DTYPES
        for name, storage in formats(case, dtype).items()
    ]
    for case, dtype, name, storage in place.all_in_time(mixed(jobs), spare=0.4 * place.seconds_left):
        with place.attempt(f"optim {case.name} {dtype} {name}"):
            through_the_scaler(place, case, dtype, storage)
    place.note("optimizers", [case.name for case in optimizers])
    place.note("optimizers_in_formats", len(jobs))

    variants = place.sized(list(op_calls.VARIANTS), ["adamw", "adam-amsgrad", "sgd-nesterov"])
    grad_dtypes = (None, torch.float16, torch.bfloat16, torch.float32)
    calls = list(product(variants, (False, True), grad_dtypes))
    for call in place.all_in_time(mixed(calls)):
        with place.attempt("{}, masters={}, grads={}".format(*call)):
            steps(place, *call)
    place.note("op_combinations", 2 * len(calls))


def formats(case: cases.Case, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    """Return the storage formats for weights of ``dtype`` and their states."""
    if dtype == torch.float64:
        return {"as is": {}}
    if dtype == torch.float32:
        formats = {"BF16 states": "bfloat16", "8-bit states": "int8"}
        states = {name: {"state_dtype": kind, "rounding_seed": 0} for name, kind in formats.items()}
        return {"as is": {}, **(states if compressible(case) else {})}
    modes = {f"master_weights={mode}": {"master_weights": mode} for mode in ("auto", "none")}
    return {**modes, **(COMPRESSED if compressible(case) else {})}


def same(ones: list[Tensor], others: list[Tensor], when: str) -> None:
    found = differing(ones, others)
    if found:
        raise AssertionError(f"{when}: {len(found)} tensors differ: {'; '.join(found[:3])}")


@cache
def drawn(device: str, tiny: bool, steps: int) -> list[list[Tensor]]:
    """Return FP32 gradients for the tensors of each step, equal for every call of an op."""
    draw = torch.Generator().manual_seed(5)
    sizes = TINY_SIZES if tiny else SIZES
    return [[torch.randn(s, generator=draw).mul_(2.0**7).to(device) for s in sizes] for _ in range(steps)]


def steps(place: Place, variant: str, masters: bool, grad_dtype: torch.dtype | None) -> None:
    """Run steps on the device, once with aligned and once with misaligned tensors."""
    dtypes, count = op_calls.HALVES if masters else op_calls.DTYPES, place.sized(STEPS, 3)
    sizes = place.sized(SIZES, TINY_SIZES)
    cpu = op_calls.step_call(variant, sizes, dtypes, masters=masters, grad_dtype=grad_dtype, taken=(0, 3))
    calls = {"on the CPU": (cpu, "cpu")}
    for name, misaligned in (("aligned", False), ("misaligned", True)):
        copy = copies(place.device, misaligned)
        calls[name] = (cpu.map(copy, lambda scalar: scalar.clone().to(place.device)), place.device)
    for call, device in calls.values():
        scalars = {"inv_scale": 2.0**-7, "clip_coef": 0.37}
        call.options |= {name: torch.tensor(value, device=device) for name, value in scalars.items()}
    for step in range(count):
        for call, device in calls.values():
            torch._foreach_copy_(call.grads, drawn(device, place.rehearse, count)[step])
            if step == WRITTEN:  # the user modifies the weights, and masters are updated
                torch._foreach_mul_(call.params[::2], 0.5)
            call.options["found_inf"] = torch.full((), float(step == SKIPPED), device=device)
            call.run()
        if step in (0, count - 1):
            for name in ("aligned", "misaligned"):
                same(cpu.exact_tensors(), calls[name][0].exact_tensors(), f"{name}, after step {step + 1}")


def gradients(place: Place, dtype: torch.dtype, scale: float) -> tuple[list[Tensor], list[Tensor]]:
    draw = torch.Generator().manual_seed(6)
    cpu = [torch.randn(s, generator=draw).mul(scale).to(dtype) for s in place.sized(SIZES, TINY_SIZES)]
    return cpu, list(map(copies(place.device, True), cpu))


def unscale(place: Place, dtype: torch.dtype) -> None:
    for factor, bad in ((1 / 3, None), (2.0**-20, None), (1.0, float("inf")), (3e38, None)):
        cpu, gpu = gradients(place, dtype, 2.0**7)
        if bad is not None:
            for grads in (cpu, gpu):
                grads[-1].view(-1)[-1] = bad
        flags = []
        for grads, device in ((cpu, "cpu"), (gpu, place.device)):
            flags.append(torch.zeros((), device=device))
            ops.unscale_(grads, torch.tensor(factor, device=device), flags[-1])
        same([*cpu, flags[0]], [*gpu, flags[1]], f"times {factor}")


def stats(place: Place, dtype: torch.dtype) -> None:
    for norm_type in (2.0, 1.0, float("inf"), 0.0, 3.0):
        cpu, gpu = gradients(place, dtype, 2.0**7)
        for values in ((), (float("inf"),), (float("nan"), float("-inf"))):
            for index, value in enumerate(values):
                for grads in (cpu, gpu):
                    grads[-1 - index].view(-1)[-1 - 3 * index] = value
            one = ops.grad_stats(cpu, torch.tensor(2.0**-7), norm_type)
            two, again = (
                ops.grad_stats(gpu, torch.tensor(2.0**-7, device=place.device), norm_type) for _ in range(2)
            )
            same([one.found_inf, one.counts], [two.found_inf, two.counts], f"norm {norm_type}")
            same(list(two), list(again), f"norm {norm_type}, twice on the device")
            close = torch.isclose(one.total, two.total.cpu(), rtol=2 * STATS_ROUNDINGS * 2.0**-24, atol=0)
            if not (close | (one.total.isnan() & two.total.cpu().isnan())):
                raise AssertionError(f"norm {norm_type}: total {float(two.total)}; CPU: {float(one.total)}")


def scale(place: Place) -> None:
    draw = torch.Generator().manual_seed(7)
    found = (torch.rand(300, generator=draw) < 0.3).float()
    options = dict(growth_factor=1.7, backoff_factor=0.3, growth_interval=2, min_scale=0.5, max_scale=1e6)
    states = []
    for device in ("cpu", place.device):
        state = [torch.tensor(v, device=device) for v in (1024.0, 0, 3)]
        state[1:] = [tracker.to(torch.int32) for tracker in state[1:]]
        for flag in found.to(device).unbind():
            ops.update_scale_(*state[:2], flag, hysteresis_tracker=state[2], hysteresis=3, **options)
        states.append(state)
    same([states[0][0]], [states[1][0]], "scale")
    assert [int(t) for t in states[0][1:]] == [int(t) for t in states[1][1:]], "trackers"


def through_the_scaler(
    place: Place, case: cases.Case, dtype: torch.dtype, storage: dict[str, Any], steps: int = STEPS
) -> None:
    """Step through the public API, without clipping: a norm may differ in its last bits."""
    seen, grads, count = [], [], place.sized(steps, 4)
    for device in ("cpu", place.device):
        twins = cases.make_params(dtype)
        params = [torch.nn.Parameter(p.detach().to(device, copy=True)) for p in twins]
        optimizer = case.ours(params, **case.options, **storage)
        scaler = GradScaler(device, init_scale=8.0, growth_interval=4)
        scaler.scale(torch.ones((), device=device))
        for step in range(count):
            if len(grads) < count:  # on the CPU, which comes first
                cases.set_grads(twins, step, scaler.get_scale())
                if step in (3, SKIPPED):
                    twins[5].grad[0, 0] = float("inf")
                grads.append([twin.grad for twin in twins])
            for param, grad in zip(params, grads[step], strict=True):
                param.grad = grad.to(device, copy=True, non_blocking=True)  # unscale_ modifies it
            if step % 3 == 2:
                scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        entries = optimizer.state_dict()["state"].values()
        state = [v for entry in entries for _, v in sorted(entry.items()) if isinstance(v, Tensor)]
        seen.append([*(p.detach() for p in params), *state, scaler._scale])
    same(*seen, "after the last step")
