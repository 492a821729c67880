"""Costs of a step besides bytes: launches (W2, W3), and host time per tensor (2,000 tensors of 10)."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from statistics import median

import torch
from torch.profiler import ProfilerActivity, profile

from ...contenders import DTYPES
from ...rows import RIVALS, Row
from ...workloads import WORKLOADS, Shapes, many_small
from ..place import Place
from ..sides import gradients, ours, theirs

PASSES = 2  # the gradient check and the step
LAUNCHES_PER_PASS = 2


def run(place: Place) -> None:
    lists: dict[str, Shapes] = place.sized(
        {"W2": WORKLOADS["W2"].full, "W3": WORKLOADS["W3"].full}, {"W2": [(5, 3), (4,)], "W3": many_small(6)}
    )
    found: dict[str, dict] = {}
    for workload, shapes in lists.items():
        for key in ("P1", "P2", "P3"):
            row = Row("adamw", workload, RIVALS[key])
            with place.attempt(f"launches of {row.name}"):
                grads = gradients(shapes, DTYPES[row.dtype], place.device)
                ours_now = launches(place, ours(shapes, DTYPES[row.dtype], place.device, grads).phase)
                found[row.name] = {
                    "ours": ours_now.total(),
                    "ours_engine": sum(n for name, n in ours_now.items() if "fusedamp" in name),
                    "theirs": launches(place, theirs(row, shapes, place.device, grads).phase).total(),
                    "our_kernels": dict(ours_now.most_common(12)),
                }
                engine = found[row.name]["ours_engine"] - 1  # without the scale update
                few = place.rehearse or engine <= PASSES * LAUNCHES_PER_PASS
                place.check(f"{row.name}: at most {LAUNCHES_PER_PASS} launches per pass", few, str(ours_now))
    place.note("launches", found)

    shapes = place.sized(WORKLOADS["host"].full, [(10,)] * 20)
    host: dict[str, dict[str, float]] = {}
    for key in ("P1", "P2", "P3"):
        row = Row("adamw", "host", RIVALS[key])
        with place.attempt(f"host time against {key}"):
            grads = gradients(shapes, DTYPES[row.dtype], place.device)
            sides = {
                "ours": ours(shapes, DTYPES[row.dtype], place.device, grads),
                "theirs": theirs(row, shapes, place.device, grads),
            }
            host[f"{row.dtype} {row.rival.title}"] = {
                f"{name}_us_per_tensor": host_us(place, side.phase) / len(shapes)
                for name, side in sides.items()
            }
        place.note("host", host)


def launches(place: Place, phase: Callable[[], None]) -> Counter[str]:
    """Count the kernels of one step by name; in a rehearsal torch's operators."""
    for _ in range(3):
        phase()
    if place.device == "cuda":
        torch.cuda.synchronize()  # excludes work that is still queued
    activities = [ProfilerActivity.CPU, *place.sized([ProfilerActivity.CUDA], [])]
    with profile(activities=activities) as recorded:
        phase()
        if place.device == "cuda":
            torch.cuda.synchronize()
    names: Counter[str] = Counter()
    for event in recorded.events() or []:
        on_device = str(event.device_type).endswith("CUDA")
        marks = ("Memcpy", "Memset", "Optimizer.", "ProfilerStep")
        if on_device == (place.device == "cuda") and not event.name.startswith(marks):
            names[event.name[:90]] += 1
    if not names:
        raise RuntimeError("the profiler recorded nothing")
    return names


def host_us(place: Place, phase: Callable[[], None]) -> float:
    """Return the microseconds until the host is free, from an idle device."""
    times = []
    for _ in range(place.sized(40, 3)):
        if place.device == "cuda":
            torch.cuda.synchronize()
        begin = time.perf_counter()
        phase()
        times.append(time.perf_counter() - begin)
    return median(times) * 1e6
