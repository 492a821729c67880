"""The reduced set (reduced.py) under compute-sanitizer."""

from __future__ import annotations

import sys

from ..place import Place, Skip
from ..process import execute, find_tool

ERROR = 86  # exit code of the sanitizer where it found something
# torch's own kernels are not the question, and checking them all takes minutes.
OURS = ["--kernel-name", "kns=fusedamp"]
# torch asks CUDA for what a machine may not have; launches that fail raise anyway.
MORE = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
STARTING = 25  # seconds that torch may take to start under it


def run(place: Place) -> None:
    tool = find_tool("compute-sanitizer")
    reduced = [sys.executable, "-m", "benchmarks.evidence.part", "reduced", "--device", place.device]
    reduced += place.sized([], ["--rehearse"])
    if place.rehearse:
        done = execute(reduced, place.seconds_left)
        place.check("the reduced set without a sanitizer", not done.verdict, done.tail)
        return
    if tool is None:
        raise Skip("compute-sanitizer was not found (it comes with the CUDA toolkit); set CUDA_HOME")
    for left, check in ((2, "memcheck"), (1, "racecheck")):
        share = place.seconds_left / left - 2
        command = [tool, "--tool", check, "--error-exitcode", str(ERROR), *MORE[check], *OURS]
        command += [*reduced, "--seconds", str(max(5.0, share - STARTING))]
        # Each tensor an allocation of its own, so that a step beyond it is seen.
        done = execute(command, share, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
        summary = [line for line in done.output.split("\n") if "SUMMARY" in line]
        place.note(check, {"seconds": round(done.seconds, 1), "summary": summary[-1:]})
        place.check(check, not done.verdict, f"{done.verdict}\n{done.tail}")
        place.check(f"{check} looked", bool(summary), f"no summary line in its output\n{done.tail}")
