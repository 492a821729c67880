"""Nsight Compute on one optimizer step: bytes moved by each of our kernels, and percent of peak bandwidth."""

from __future__ import annotations

import csv
import sys

from ..place import Place, Skip
from ..process import execute, find_tool

METRICS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "percent of DRAM peak",
}
KERNELS = "regex:step_kernel|stats_kernel|unscale_kernel|combine_kernel|prepare_kernel|update_scale"


def run(place: Place) -> None:
    one_phase = [sys.executable, "-m", "benchmarks.evidence.part", "phase", "--device", place.device]
    if place.rehearse:
        done = execute([*one_phase, "--rehearse"], place.seconds_left)
        place.check("one step without a profiler", not done.verdict, done.tail)
        return
    tool = find_tool("ncu")
    if tool is None:
        raise Skip("ncu was not found (it comes with the CUDA toolkit); set CUDA_HOME")
    options = ["--clock-control", "none", "--csv", "--metrics", ",".join(METRICS), "-k", KERNELS]
    done = execute([tool, *options, *one_phase], place.seconds_left - 5)
    kernels = read(done.output)
    place.note("kernels", kernels)
    place.check("ncu", not done.verdict, f"{done.verdict}\n{done.tail}")
    place.check("counters read", bool(kernels), done.tail)


def read(output: str) -> list[dict[str, str]]:
    """Parse one record per launch from ncu's CSV, which is mixed with other lines."""
    lines = [line for line in output.split("\n") if line.startswith('"')]
    launches: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines):
        if row.get("Metric Name") in METRICS:
            launch = launches.setdefault(row["ID"], {"kernel": row["Kernel Name"][:100]})
            launch[METRICS[row["Metric Name"]]] = f"{row['Metric Value']} {row['Metric Unit']}"
    return list(launches.values())
