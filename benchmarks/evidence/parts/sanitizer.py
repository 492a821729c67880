"""The reduced set (reduced.py) under compute-sanitizer."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from ..place import Place, Skip
from ..process import execute, find_tool

ERROR = 86  # exit code of the sanitizer for findings
# torch's kernels are excluded: checking them takes minutes.
OURS = ["--kernel-name", "kns=fusedamp"]
# torch queries CUDA features that a machine may lack; failed launches raise anyway.
MORE = {"memcheck": ["--report-api-errors", "no"], "racecheck": []}
ENDING = 10  # seconds for torch's start under it, before its clock runs, and for the summary


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
    for share, check in ((0.67, "memcheck"), (1.0, "racecheck")):  # of the remaining time
        seconds = share * place.seconds_left - 2
        command = [tool, "--tool", check, "--error-exitcode", str(ERROR), *MORE[check], *OURS]
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "result.json"
            command += [*reduced, "--seconds", str(max(5.0, seconds - ENDING)), "--result", str(file)]
            # One allocation per tensor, so that out-of-bounds accesses are detected.
            done = execute(command, seconds, {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"})
            result = json.loads(file.read_text()) if file.exists() else {}
        jobs = result.get("findings", {}).get("jobs_done", "none")
        summary = [line for line in done.output.split("\n") if "SUMMARY" in line]
        place.note(check, {"seconds": round(done.seconds, 1), "jobs": jobs, "summary": summary[-1:]})
        place.check(check, not done.verdict, f"{done.verdict}, {jobs} jobs done\n{done.tail}")
        place.check(f"{check} ran", bool(summary), f"no summary line in its output\n{done.tail}")
