"""The parts of the evidence, in the order in which they run: what matters most comes first."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    name: str  # of the module
    title: str
    seconds: int  # that it may take on a GPU


PARTS = {
    part.name: part
    for part in (
        Part("build", "Build for this GPU", 200),
        Part("bitwise", "CPU = CUDA, bit for bit", 80),
        Part("graphs", "CUDA graphs: capture and replay against eager", 80),
        Part("sync", "No host synchronisation in the tail of a step", 40),
        Part("large", "More than 2^31 elements", 60),
        Part("bandwidth", "Bandwidth and time of the optimizer phase", 120),
        Part("launches", "Launches per step, host time per tensor", 45),
        Part("training", "A GPT-2-size training step", 75),
        Part("suite", "The test suite on the device", 150),
        Part("sanitizer", "compute-sanitizer: memcheck and racecheck", 90),
        Part("counters", "Nsight Compute: bytes and throughput of each kernel", 45),
    )
}
