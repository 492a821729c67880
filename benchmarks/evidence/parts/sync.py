"""Checks that a step has no host sync: with torch's sync debug mode, and while the device sleeps."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from fusedamp import clip_grad_norm_

from ..borrowed import cases
from ..place import Place
from .graphs import Training, feed, formats, training

ASLEEP_CYCLES = 400_000_000  # at least 0.2 s


@contextmanager
def alarmed(place: Place) -> Iterator[None]:
    """Make every synchronization that torch knows of raise."""
    if place.device != "cuda":
        yield
        return
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def tails(model: Training) -> None:
    model.tail()
    skipped = model.scaler.last_step_skipped
    clip_grad_norm_(model.params, torch.ones((), device=skipped.device), norm_type=float("inf"))


def run(place: Place) -> None:
    if place.device == "cuda":
        with place.attempt("the sync debug mode itself"):
            heard = False
            with alarmed(place):
                try:
                    torch.ones((), device="cuda").item()
                except RuntimeError:
                    heard = True
            assert heard, "torch did not raise at .item()"
    with place.attempt("the host is free while the device sleeps"):
        place.note("host_ms_beside_sleeping_device", free_host(place))
    flows = [
        (case, dtype, name, storage, flow)
        for case in place.sized(cases.CASES, cases.MAIN[:1])
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for name, storage in formats(case, dtype).items()
        for flow in ("unscale_", "fused")
    ]
    for case, dtype, name, storage, flow in place.all_in_time(flows):
        with place.attempt(f"{case.name} {dtype} {name} {flow}"):
            model = training(place, case, dtype, storage, flow)
            for step in range(place.sized(6, 4)):  # the first creates states, later ones repeat it
                feed(model, step)
                with alarmed(place):
                    tails(model)
    place.note("flows", len(flows))


def free_host(place: Place) -> float:
    """Return the host milliseconds of a step queued after a long sleep; detects any kind of wait."""
    model = training(place, cases.BY_NAME["adamw"], torch.bfloat16, {}, "fused")
    for step in range(5):
        feed(model, step)
        model.tail()
    asleep = 0.0
    if place.device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        torch.cuda._sleep(ASLEEP_CYCLES)
        end.record()
    begin = time.perf_counter()
    model.tail()
    taken = (time.perf_counter() - begin) * 1e3
    if place.device == "cuda":
        torch.cuda.synchronize()
        asleep = start.elapsed_time(end)
        assert taken < asleep / 2, f"the host was busy for {taken:.0f} ms; the device slept {asleep:.0f} ms"
    return taken
