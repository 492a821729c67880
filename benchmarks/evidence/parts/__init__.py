"""The parts of the evidence in starting order, the most important first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter


@dataclass(frozen=True)
class Part:
    name: str  # of the module
    title: str
    seconds: int  # time limit on a GPU
    proves: bool = False  # may run concurrently with other tests; builds and measurements run alone


PARTS = {
    part.name: part
    for part in (
        Part("build", "Build for this GPU", 200),
        Part("bitwise", "CPU = CUDA, bit for bit", 150, proves=True),
        Part("graphs", "CUDA graphs: capture and replay against eager", 150, proves=True),
        Part("suite", "The test suite on the device", 180, proves=True),
        Part("sanitizer", "compute-sanitizer: memcheck and racecheck", 120, proves=True),
        Part("sync", "No host synchronization in the tail of a step", 60, proves=True),
        Part("large", "More than 2^31 elements", 90, proves=True),
        Part("linear", "Linear layers: values, sums, same bits", 60, proves=True),
        Part("bandwidth", "Bandwidth and time of optimizer steps", 120),
        Part("launches", "Launches per step, host time per tensor", 45),
        Part("offload", "Offload: bits, bus, memory, step", 75),
        Part("watch", "Watches: counts, bits, replayed graphs, cost", 75),
        Part("training", "A GPT-2-size training step", 75),
        Part("energy", "Energy: joules per sample in FP32, TF32, FP16 and BF16", 75),
        Part("fusions", "Linear layers: plans, fusions, a step", 75),
        Part("counters", "Nsight Compute: bytes and throughput of each kernel", 45),
    )
}


def stages(chosen: Iterable[str]) -> list[list[Part]]:
    """Group the chosen parts into stages, in order; those of one stage may run concurrently."""
    parts = [part for name, part in PARTS.items() if name in set(chosen)]
    keys = [0 if part.proves else index for index, part in enumerate(parts, start=1)]
    return [[part for _, part in group] for _, group in groupby(zip(keys, parts, strict=True), itemgetter(0))]
