"""W1 to W4: optimizer steps against torch, their minimum bytes, and the device's copy speed.

Compressed formats have no rival: they are compared with their minimum bytes.

Two times each: as a user sees it (from an idle device, including the host), and device time only (the host
ran ahead).
"""

from __future__ import annotations

import gc
from dataclasses import dataclass
from math import prod

import torch
from fusedamp.optim.state.formats import Storage

from ...contenders import DTYPES, PLAIN
from ...rows import RIVALS, Row
from ...workloads import WORKLOADS, Shapes, gpt2, many_small, numel
from ..clock import Clock, copy_speed
from ..place import Place
from ..sides import Side, gradients, ours, theirs
from .probe import driver


def llama_7b() -> Shapes:
    """Touvron et al. 2023, arXiv:2302.13971: 6.7e9 parameters."""
    width, inner, words = 4_096, 11_008, 32_000
    layer: Shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner), (width,), (width,)]
    return [(words, width), *layer * 32, (width,), (words, width)]


REAL: dict[str, Shapes] = {
    "W1": [(1_000_000_000,)],
    "W2": WORKLOADS["W2"].full,
    "W3": WORKLOADS["W3"].full,
    "W4 GPT-2 XL": gpt2(50_257, 1_024, 1_600, 48),
    "W4 7B": llama_7b(),
}
TINY: dict[str, Shapes] = {
    "W1": [(20_001,)],
    "W2": gpt2(50, 16, 8, 1),
    "W3": many_small(8),
    "W4 GPT-2 XL": gpt2(60, 16, 8, 2),
    "W4 7B": [(10, 10)] * 3,
}


@dataclass(frozen=True)
class Format:
    """Storage format of AdamW's masters and states of BF16 weights."""

    name: str
    storage: Storage
    kept: float  # bytes per parameter without the weight

    @property
    def floor(self) -> float:
        """Return the bytes moved per parameter: gradient check; gradient read, weight and the rest read and
        written."""
        return 2 + 2 + 2 * (2 + self.kept)


SPLIT = Format("split masters", Storage(master_weights="split"), 2 + 8)
SPLIT_BF16 = Format(
    "split masters, BF16 states", Storage(master_weights="split", state_dtype=torch.bfloat16), 2 + 4
)
SPLIT_INT8 = Format(
    "split masters, 8-bit states", Storage(master_weights="split", state_dtype="int8"), 2 + 2 * (1 + 4 / 128)
)
NEAREST = Format("no masters, to nearest", Storage(master_weights="none"), 8)
STOCHASTIC = Format("no masters, stochastic", Storage(master_weights="none", stochastic_rounding=True), 8)
# The workload, and its rival or its format.
PAIRS: list[tuple[str, str | Format]] = [
    *[("W1", what) for what in ("P1", "P3", SPLIT_INT8, "P2", "P4", SPLIT, SPLIT_BF16, NEAREST, STOCHASTIC)],
    *[(workload, rival) for workload in ("W2", "W3") for rival in ("P1", "P3", "P2", "P4")],
    *[("W4 7B", SPLIT_INT8), ("W4 GPT-2 XL", SPLIT_INT8), ("W4 GPT-2 XL", "P3"), ("W4 GPT-2 XL", "P1")],
]
COPY_TARGET = 0.9  # of copy speed, on W1 and W4
MAKING_STATES = 40  # temporary bytes per element


def bytes_held(row: Row, form: Format | None) -> float:
    """Return device bytes per parameter: shared gradients, both sides' weights and states, torch's
    temporaries."""
    if form is not None:
        return 2 + 2 + form.kept
    fp32 = row.dtype == "fp32"
    our, their = (12, 12) if fp32 else (14, 18)
    temporary = 8 if row.rival.implementation == "foreach" else 0
    return (4 if fp32 else 2) + our + their + temporary


def run(place: Place) -> None:
    clock = Clock(place.device)
    place.note("state_before", driver() if not place.rehearse else "")
    copied = copy_speed(clock, place.device, place.sized(4 << 30, 1 << 16))
    place.note("copy_gb_s", copied)
    gc.collect()
    rows: list[dict] = []
    for workload, other in place.sized(PAIRS, PAIRS[2::3]):
        shapes = place.sized(REAL, TINY)[workload]
        form = other if isinstance(other, Format) else None
        row = Row("adamw", workload, RIVALS["P3" if isinstance(other, Format) else other])
        rival = other if form is None else form.name
        about = {"workload": workload, "dtype": row.dtype, "rival": rival}
        if place.seconds_left < 8:
            rows.append({**about, "skipped": "no time left"})
            continue
        if place.device == "cuda":
            torch.cuda.empty_cache()
            need, free = bytes_held(row, form) * numel(shapes), torch.cuda.mem_get_info()[0]
            if form is not None:  # the first step creates the states in FP32, one tensor at a time
                need += MAKING_STATES * max(map(prod, shapes))
            if need > 0.95 * free:
                why = f"needs {need / 1e9:.0f} GB, {free / 1e9:.0f} GB are free"
                rows.append({**about, "skipped": why})
                continue
        with place.attempt(f"{workload} {row.dtype} against {rival}"):
            rows.append(measure(place, clock, row, shapes, copied, form))
        gc.collect()
        place.note("rows", rows)
    place.note("rows", rows)
    place.note("targets", targets(rows))
    place.note("state_after", driver() if not place.rehearse else "")


def measure(place: Place, clock: Clock, row: Row, shapes: Shapes, copied: float, form: Format | None) -> dict:
    alone, dtype = form is not None, DTYPES[row.dtype]
    grads = gradients(shapes, dtype, place.device)
    storage = PLAIN if form is None else form.storage
    sides: dict[str, Side] = {"ours": ours(shapes, dtype, place.device, grads, storage=storage)}
    if not alone:
        sides["theirs"] = theirs(row, shapes, place.device, grads)
    calls, before = ({name: getattr(s, what) for name, s in sides.items()} for what in ("phase", "restore"))
    # Our side reads gradients that theirs has unscaled: the values differ by a power of two, the work does
    # not.
    samples = place.sized(15, 1)
    seen = clock.alternate(calls, before, samples, ahead=False)
    device = clock.alternate(calls, before, samples, ahead=True)
    for name, side in sides.items():
        finite = all(bool(weight.isfinite().all()) for weight in side.weights)
        place.check(f"{row.name}: {name} stays finite", finite)
    floor = row.floor_bytes if form is None else form.floor
    gb_s = floor * numel(shapes) / device["ours"]["ms"] / 1e6
    return {
        "workload": row.workload,
        "tensors": len(shapes),
        "numel": numel(shapes),
        "dtype": row.dtype,
        "rival": f"{row.rival.key} {row.rival.title}" if form is None else form.name,
        "seen": seen,
        "device": device,
        "floor_bytes": floor,
        "our_bytes": row.our_bytes if form is None else floor,
        "rival_bytes": None if alone else row.rival_bytes,
        "gb_s": gb_s,
        "share_of_copy": gb_s / copied,
        "ratio_seen": None if alone else seen["theirs"]["ms"] / seen["ours"]["ms"],
        "ratio_device": None if alone else device["theirs"]["ms"] / device["ours"]["ms"],
    }


def targets(rows: list[dict]) -> dict[str, bool]:
    """Return the project's targets and whether they are met; a missed one is a finding, not a failure."""
    met = {}
    for row in rows:
        if "skipped" in row:
            continue
        name = f"{row['workload']} {row['dtype']}" + ("" if row["rival_bytes"] else f", {row['rival']}")
        if not row["workload"].startswith(("W2", "W3")):
            met[f"{name}: {COPY_TARGET:.0%} of copy speed"] = row["share_of_copy"] >= COPY_TARGET
        if row["rival"].startswith("P1"):
            wanted = row["rival_bytes"] / row["our_bytes"]
            met[f"{name}: {wanted:.2f} times the speed of torch fused"] = row["ratio_seen"] >= wanted
    return met
