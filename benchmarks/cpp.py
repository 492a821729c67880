"""``--cpp``: AdamW in a C++ program against LibTorch's, on one thread, and what the headers cost to compile.

Builds cpp_step.cpp with the CMake package, and times pairs of iterations in one process. Counts instructions
by valgrind, if it is installed. Compiles a file with fusedamp's headers and one with torch's alternately.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fusedamp
import torch
from rich.console import Console
from rich.markdown import Markdown

from .machine import Machine
from .results import write_csv
from .timing import Sample, Timing, Triple, percentile

SOURCE = Path(__file__).with_name("cpp_step.cpp")
PACKAGE = Path(fusedamp.__file__).resolve().parent
HEADERS = next(path for path in (PACKAGE / "include", PACKAGE.parents[1] / "csrc/include") if path.exists())
CLASSES = HEADERS / "fusedamp/source"
TENSORS, QUICK_TENSORS = 2_000, 200
NUMELS = (16, 512)
BASELINES = {"optim": "`torch::optim::AdamW`", "fused": "`at::_fused_adamw_` by hand"}
PHASES = {"step": "step", "scaler": "unscaling, clipping, step, scale update"}
COMPILED = {  # a file of a program, with an optimizer and fusedamp's scaler; fusedamp's classes
    "file": """#include <fusedamp/fusedamp.h>
#include <torch/torch.h>
void train(torch::nn::Sequential model, at::Tensor x) {
  using namespace fusedamp::optim;
  AdamW optimizer(model->parameters(), AdamWOptions(1e-3).weight_decay(0.1));
  fusedamp::GradScaler scaler;
  scaler.scale(model->forward(x).mean()).backward();
  scaler.clip_grad_norm_(optimizer, 1.0);
  scaler.step(optimizer);
  scaler.update();
}
""",
    "classes": "".join(f'#include "{path}"\n' for path in sorted(CLASSES.glob("*.cpp"))),
    "theirs": """#include <torch/torch.h>
void train(torch::nn::Sequential model, at::Tensor x) {
  using namespace torch::optim;
  AdamW optimizer(model->parameters(), AdamWOptions(1e-3).weight_decay(0.1));
  model->forward(x).mean().backward();
  torch::nn::utils::clip_grad_norm_(model->parameters(), 1.0);
  optimizer.step();
}
""",
}
COMPILED_ROWS = {
    "file": "A file that includes torch/torch.h and fusedamp/fusedamp.h, and uses fusedamp, compiles",
    "classes": "fusedamp's classes, once in a program, compile",
}
PROJECT = """cmake_minimum_required(VERSION 3.18)
project(cpp_step LANGUAGES CXX)
find_package(fusedamp REQUIRED CONFIG)
add_executable(cpp_step "{source}")
target_link_libraries(cpp_step PRIVATE fusedamp::fusedamp)
"""


def build(folder: Path, flags: str = "-O2") -> Path:
    """Build the program with the CMake package; return its path."""
    (folder / "CMakeLists.txt").write_text(PROJECT.format(source=SOURCE))
    options = [f"-Dfusedamp_DIR={PACKAGE / 'cmake'}", f"-DCMAKE_PREFIX_PATH={torch.utils.cmake_prefix_path}"]
    options += [
        "-DCMAKE_BUILD_TYPE=Release",
        f"-DCMAKE_CXX_FLAGS_RELEASE={flags}",
        "-DCMAKE_EXPORT_COMPILE_COMMANDS=ON",
    ]
    for command in (["-S", folder, "-B", folder / "build", *options], ["--build", folder / "build"]):
        subprocess.run(["cmake", *map(str, command)], check=True, stdout=subprocess.DEVNULL)
    return folder / "build" / "cpp_step"


def output(program: Path, *arguments: object) -> str:
    variables = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [str(program), *map(str, arguments)]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=variables)
    return done.stdout


def timed(program: Path, phase: str, baseline: str, numel: int, tensors: int, samples: int) -> Timing:
    """Return at most ``samples`` pairs of undisturbed samples."""
    timing = Timing(threads=1)
    for line in output(program, "time", phase, baseline, numel, tensors, 4 * samples).splitlines():
        numbers = [float(word) for word in line.split()]
        ours, theirs = Sample(*numbers[:3]), Sample(*numbers[3:])
        if ours.disturbed(1) or theirs.disturbed(1):
            timing.dropped += 1
        elif len(timing.clean) < samples:
            timing.clean.append(Triple(ours, theirs, None))
    return timing


def instructions(program: Path, phase: str, side: str, numel: int, tensors: int) -> float:
    """Count the instructions of one iteration, per tensor, with AVX2; NaN without valgrind."""
    if not shutil.which("valgrind"):
        return float("nan")
    tool = ["valgrind", "--tool=callgrind", "--toggle-collect=measured", "--callgrind-out-file=/dev/null"]
    command = [*tool, str(program), "once", phase, side, str(numel), str(tensors)]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    (count,) = re.findall(r"Collected : (\d+)", said)
    return int(count) / tensors


def compiled(folder: Path, samples: int) -> dict[str, Timing]:
    """Compile all alternately at -O2; return the compiler's user times as CPU times, of file and classes."""
    commands = json.loads((folder / "build" / "compile_commands.json").read_text())
    (command,) = (c["command"].partition(" -o ")[0] for c in commands if c["file"] == str(SOURCE))
    timings, taken = {"file": Timing(threads=1), "classes": Timing(threads=1)}, {}
    for attempt in range(samples):
        for side, code in list(COMPILED.items())[:: -1 if attempt % 2 else 1]:
            (folder / f"{side}.cpp").write_text(code)
            before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
            subprocess.run([*command.split(), "-c", f"{side}.cpp", "-o", f"{side}.o"], cwd=folder, check=True)
            seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before
            taken[side] = Sample(seconds, seconds, 0.0)
        for side, timing in timings.items():
            timing.clean.append(Triple(taken[side], taken["theirs"], None))
    return timings


def record(row: str, timing: Timing, **others: Any) -> dict[str, Any]:
    ratios = timing.ratios()
    return dict(
        row=row,
        **others,
        **{f"ratio_p{percent}": percentile(ratios, percent) for percent in (20, 50, 80)},
        clean=len(timing.clean),
        dropped=timing.dropped,
    )


def measure(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    tensors, numels = (QUICK_TENSORS, NUMELS[:1]) if options.quick else (TENSORS, NUMELS)
    with tempfile.TemporaryDirectory(prefix="fusedamp-cpp-") as name:
        folder = Path(name)
        program = build(folder)
        for numel in numels:
            for phase in PHASES:
                counts = {
                    side: float("nan")
                    if options.quick
                    else instructions(program, phase, side, numel, tensors)
                    for side in ("ours", *BASELINES)
                }
                for baseline in BASELINES:
                    timing = timed(program, phase, baseline, numel, tensors, options.samples)
                    yield record(
                        phase,
                        timing,
                        baseline=baseline,
                        numel=numel,
                        tensors=tensors,
                        ours=percentile(timing.seconds("ours"), 50) / tensors * 1e6,
                        theirs=percentile(timing.seconds("theirs"), 50) / tensors * 1e6,
                        instructions=counts["ours"],
                        instructions_of_torch=counts[baseline],
                    )
        if not options.quick:
            for side, timing in compiled(folder, 5).items():
                yield record(
                    f"compile {side}",
                    timing,
                    baseline="torch/torch.h",
                    numel="",
                    tensors="",
                    ours=percentile(timing.seconds("ours"), 50),
                    theirs=percentile(timing.seconds("theirs"), 50),
                    instructions="",
                    instructions_of_torch="",
                )


def run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    """Measure all rows; write CSV and report."""
    records = list(measure(options))
    name = f"{machine.kind}-cpp" + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [record | vars(machine) for record in records])
    text = report(records, machine)
    (out / f"{name}.md").write_text(text)
    Console(width=max(console.width, 110)).print(Markdown(text))
    return 0


def report(records: list[dict[str, Any]], machine: Machine) -> str:
    lines = [
        f"# C++ programs, on {machine.title}, 1 thread",
        "",
        "AdamW, FP32 tensors. Speedup: CPU time of LibTorch over fusedamp's, measured alternately in one "
        "process, so both start with the other's data in the caches; median, 20th to 80th percentile. "
        "`torch::optim::AdamW` is clipped by `torch::nn::utils::clip_grad_norm_`, `at::_fused_adamw_` by "
        "foreach operations; their scaler is made by hand of torch's operations, and reads the overflow flag "
        "on the host. Instructions: of one iteration with warm caches, by callgrind, which has AVX2.",
        "",
        "| tensors | iteration | torch | speedup | ours, us per tensor | torch's | ours, instructions per "
        "tensor | torch's |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for r in records:
        speedup = f"**{r['ratio_p50']:.2f}** ({r['ratio_p20']:.2f} to {r['ratio_p80']:.2f})"
        if r["row"].startswith("compile"):
            what = COMPILED_ROWS[r["row"].removeprefix("compile ")]
            lines += [
                "",
                f"{what} in **{1 / r['ratio_p50']:.2f}** ({1 / r['ratio_p80']:.2f} to "
                f"{1 / r['ratio_p20']:.2f}) times the time of a file that includes torch/torch.h and uses "
                "`torch::optim::AdamW` (user time, -O2).",
            ]
            continue
        lines.append(
            f"| {r['tensors']:,} of {r['numel']} elements | {PHASES[r['row']]} | {BASELINES[r['baseline']]} "
            f"| {speedup} | {r['ours']:.2f} | {r['theirs']:.2f} | {r['instructions']:,.0f} | "
            f"{r['instructions_of_torch']:,.0f} |"
        )
    return "\n".join(lines) + "\n"
