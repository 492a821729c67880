"""``make bench``: times optimizer steps against torch, row by row, and writes CSV, report and chart."""

from __future__ import annotations

import argparse
import gc
import sys
from pathlib import Path

if not __package__:  # run as a file: make the folder a package, so that its modules find each other
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    __package__ = "benchmarks"

try:
    import matplotlib  # noqa: F401
    import numpy  # noqa: F401
    from rich.console import Console
    from rich.markdown import Markdown
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
except ImportError as error:
    sys.exit(f"The benchmarks need {error.name}: pip install '.[bench]' in the source folder.")

from benchmarks import chart, cliffs, cpp, linear, numerics, offload, scaling, small, storage
from benchmarks.contenders import DTYPES
from benchmarks.duel import Duel, WrongResult, agreed, check_small
from benchmarks.machine import ROOT, Machine, this_machine
from benchmarks.report import markdown
from benchmarks.results import Result, write_csv
from benchmarks.rows import RIVALS, ROWS, Row
from benchmarks.stream import NoStream, Stream
from benchmarks.timing import Budget, Limits, alternate
from benchmarks.workloads import WORKLOADS

RESULTS = ROOT / "benchmarks" / "results"
PARTIAL = ROOT / "benchmarks" / "partial"  # output of quick and selective runs; not committed
STREAM_NUMEL = 32_000_000
QUICK_STREAM_NUMEL = 2_000_000
SECONDS, QUICK_SECONDS = 500.0, 40.0  # of a full run
LONGEST, QUICK_LONGEST = 8.0, 0.5  # of one measurement


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    cores = this_machine().cores
    rivals = "; ".join(f"{r.key} {r.title}, {r.dtype.upper()}" for r in RIVALS.values())
    workloads = "; ".join(f"{w.name} {w.story}" for w in WORKLOADS.values())
    parser = argparse.ArgumentParser(
        prog="benchmarks/run.py",
        description="Times optimizer steps of fusedamp against torch on the CPU.",
        epilog=f"Rivals: {rivals}. Workloads: {workloads}.",
    )
    add = parser.add_argument
    add(
        "--quick",
        action="store_true",
        help="reduced sizes, few samples, under 1 minute: a trial, not a result",
    )
    add("--workload", nargs="+", choices=WORKLOADS, help="only these workloads")
    add("--rival", nargs="+", choices=RIVALS, help="only against these rivals")
    add("--dtype", nargs="+", choices=DTYPES, help="only weights of these dtypes")
    add(
        "--threads",
        nargs="+",
        type=int,
        help="numbers of threads (default: 1, and 2 with two cores)",
    )
    add(
        "--samples",
        type=int,
        help="clean pairs of samples per row and number of threads (default: 15; quick: 5)",
    )
    add("--out", type=Path, help=f"folder for all files (default: {RESULTS.relative_to(ROOT)} for a "
        f"whole run, {PARTIAL.relative_to(ROOT)} otherwise)")  # fmt: skip
    add(
        "--scaling",
        action="store_true",
        help="instead of the rows: cost over tensors, elements and threads",
    )
    add(
        "--storage",
        action="store_true",
        help="instead of the rows: formats of masters and states, fusedamp against fusedamp",
    )
    add(
        "--cliffs",
        action="store_true",
        help="instead of the rows: zeros, many groups, first steps, fusedamp against fusedamp",
    )
    add(
        "--small",
        action="store_true",
        help="instead of the rows: host time of a step over small tensors, against torch",
    )
    add(
        "--linear",
        action="store_true",
        help="instead of the rows: linear layers of fusedamp.nn, against torch",
    )
    add(
        "--offload",
        action="store_true",
        help="instead of the rows: steps with masters and states on the host, against those without",
    )
    add(
        "--numerics",
        action="store_true",
        help="instead of the rows: iterations with a watch, against those without",
    )
    add(
        "--cpp",
        action="store_true",
        help="instead of the rows: steps in a C++ program, against LibTorch; needs CMake and a compiler",
    )
    options = parser.parse_args(arguments)
    options.threads = sorted(set(options.threads or [1, min(2, cores)]))
    if not 1 <= options.threads[0] <= options.threads[-1] <= cores:
        parser.error(f"argument --threads: got {options.threads}; this process may use 1 to {cores} cores")
    if options.samples is None:
        options.samples = 5 if options.quick else 15
    if options.samples < 1:
        parser.error(f"argument --samples: got {options.samples}; expected at least 1")
    for alone in (
        alones := ("scaling", "storage", "cliffs", "small", "linear", "offload", "numerics", "cpp")
    ):
        if getattr(options, alone) and (options.workload or options.rival or options.dtype):
            parser.error(
                f"argument --{alone}: has its own workloads and rivals; leave out --workload, --rival and "
                "--dtype"
            )
    chosen = [alone for alone in alones if getattr(options, alone)]
    if len(chosen) > 1:
        parser.error(f"argument --{chosen[1]}: not allowed with --{chosen[0]}; run one after the other")
    options.rows = select(options)
    if not options.rows:
        parser.error("no row matches --workload, --rival and --dtype together; there are: "
                     + ", ".join(row.name for row in ROWS))  # fmt: skip
    return options


def select(options: argparse.Namespace) -> list[Row]:
    return [
        row
        for row in ROWS
        if (not options.workload or row.workload in options.workload)
        and (not options.rival or row.rival.key in options.rival)
        and (not options.dtype or row.dtype in options.dtype)
    ]


def measure(row: Row, options: argparse.Namespace, budget: Budget, stream: Stream | None) -> list[Result]:
    """Check one row, time it with each number of threads, and check it again at full size."""
    gc.collect()  # free the previous row's memory
    shapes = WORKLOADS[row.workload].shapes(options.quick)
    checked = check_small(row, shapes)
    duel = Duel(row, shapes)
    duel.both()
    roof = None if row.workload == "host" else stream
    timings = []
    for threads in options.threads:
        limits = Limits(options.samples, budget.share())
        timings.append(alternate(duel.ours.phase, duel.theirs.phase, duel.refill, roof, threads, limits))
        duel.steps += limits.warm_up + len(timings[-1].clean) + timings[-1].dropped
    agreed(duel, duel.agreement())
    return [Result(row, shapes, timing, checked, roof.bytes if roof else None) for timing in timings]


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    machine, console = this_machine(), Console(stderr=True)
    whole = not (options.quick or options.workload or options.rival or options.dtype)
    out = options.out or (RESULTS if whole else PARTIAL)
    out.mkdir(parents=True, exist_ok=True)
    try:
        if options.scaling:
            return scaling.run(options, machine, out, console)
        if options.storage:
            return storage.run(options, machine, out, console)
        if options.cliffs:
            return cliffs.run(options, machine, out, console)
        if options.small:
            return small.run(options, machine, out, console)
        if options.linear:
            return linear.run(options, machine, out, console)
        if options.offload:
            return offload.run(options, machine, out, console)
        if options.numerics:
            return numerics.run(options, machine, out, console)
        if options.cpp:
            return cpp.run(options, machine, out, console)
        return _run(options, machine, out, console)
    except WrongResult as error:
        console.print(f"[red]Wrong result, nothing written.[/red] {error}")
        return 1


def _run(options: argparse.Namespace, machine: Machine, out: Path, console: Console) -> int:
    no_stream, stream = None, None
    try:
        stream = Stream(QUICK_STREAM_NUMEL if options.quick else STREAM_NUMEL)
    except NoStream as error:
        no_stream = str(error)
        console.print(f"No stream measurement in this run: {no_stream}.")
    columns = (BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}"))
    seconds, longest = (QUICK_SECONDS, QUICK_LONGEST) if options.quick else (SECONDS, LONGEST)
    budget = Budget(seconds, len(options.rows) * len(options.threads), longest)
    results: list[Result] = []
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("", total=len(options.rows))
        for row in options.rows:
            progress.update(task, description=row.name)
            results += measure(row, options, budget, stream)
            progress.advance(task)
    name = machine.kind + ("-quick" if options.quick else "")
    write_csv(out / f"{name}.csv", [result.record(machine, options.quick) for result in results])
    text = markdown(results, machine, options.quick, no_stream)
    (out / f"{name}.md").write_text(text)
    drawn = chart.draw(results, machine, options.quick, out / f"{name}.png")
    Console(width=max(console.width, 110)).print(Markdown(text))
    console.print(
        "Written:", *(f"{out / name}{ending}" for ending in (".csv", ".md")), *drawn, soft_wrap=True
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
