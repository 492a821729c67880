"""The Markdown report: every row, whether faster or slower."""

from __future__ import annotations

from collections import Counter
from statistics import median

from .machine import Machine
from .results import Result
from .workloads import WORKLOADS, numel

METHOD = """\
Timed: a full optimizer step through the public Python API on the CPU: unscale, overflow check,
`clip_grad_norm_`, optimizer step and scale update, with the weights in their final dtype. fusedamp has FP32
masters of 16-bit weights. Both sides start from the same weights and are checked to reach the same weights
(before the timing with clipping and a skipped step, after it at full size).

**Numbers are speedups (torch time / fusedamp time)**, measured alternately in one process: the median over
pairs of samples, then the 20th to 80th percentile. For one thread they are ratios of CPU time, for more of
wall time. Pairs in which either side lost a core to other processes are dropped and counted. *By hand*:
gradients copied to FP32, torch's fused optimizer on FP32 masters, weights copied back. *Bytes*: per
parameter, moved by the passes of each side (`benchmarks/rows.py`). *Of the stream*: the bandwidth of our
full step, counting only the bytes that every implementation must move, over that of this machine's stream
of 4 reads and 3 in-place writes, measured with each pair.
"""
QUICK = """\
> **A quick run: reduced sizes, which fit into caches, and few samples. It tests the benchmark; its speedups
> are not results.**
"""


def markdown(results: list[Result], machine: Machine, quick: bool, no_stream: str | None) -> str:
    """Return the report of one run."""
    threads = sorted({result.timing.threads for result in results})
    by_row: dict[str, dict[int, Result]] = {}
    for result in results:
        by_row.setdefault(result.row.name, {})[result.timing.threads] = result
    parts = [
        f"# Optimizer steps on {machine.title}",
        *([QUICK] if quick else []),
        METHOD,
        _facts(results, machine, no_stream),
    ]
    parts.append("\n".join(_tally(results, count) for count in threads))
    present = {result.row.workload: result for result in results}
    for name in (name for name in WORKLOADS if name in present):
        size = f"{len(present[name].shapes):,} tensors, {numel(present[name].shapes):,} elements"
        size = size.replace("1 tensors", "1 tensor") if len(present[name].shapes) == 1 else size
        parts.append(f"## {name}: {WORKLOADS[name].story} ({size})")
        rows = [pair for pair in by_row.values() if next(iter(pair.values())).row.workload == name]
        parts.append(_table(rows, threads, per_tensor=name == "host"))
    return "\n\n".join(part.strip() for part in parts) + "\n"


def _facts(results: list[Result], machine: Machine, no_stream: str | None) -> str:
    lines = [
        f"CPU {machine.cpu}, {machine.cores} cores, flags {machine.flags}; huge pages: {machine.huge_pages}.",
        f"torch {machine.torch}, fusedamp {machine.fusedamp} at commit {machine.commit} on its "
        f"{machine.target} kernels, {machine.date}.",
    ]
    load = median(result.timing.other_load for result in results)
    if load >= 0.1:
        lines.append(f"**Other processes kept {load:.1f} cores busy**, so expect dropped samples.")
    if no_stream:
        lines.append(f"No stream was measured: {no_stream}.")
    return "\n".join(lines)


def _tally(results: list[Result], threads: int) -> str:
    counts = Counter(result.verdict for result in results if result.timing.threads == threads)
    order = ("faster", "even", "slower", "not measured")
    text = ", ".join(
        f"{counts[verdict]} {verdict}" for verdict in order if counts[verdict] or verdict == "slower"
    )
    return f"- **{threads_of(threads)}**: fusedamp is {text}, of {counts.total()} rows."


def threads_of(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


def _table(rows: list[dict[int, Result]], threads: list[int], per_tensor: bool) -> str:
    heads = ["optimizer", "weights", "against", *map(threads_of, threads)]
    heads += ["ns per tensor, ours / theirs"] if per_tensor else ["bytes, ours / theirs", "of the stream"]
    heads += ["dropped"]
    lines = [heads, ["---"] * 3 + ["---:"] * (len(heads) - 3)]
    for pair in rows:
        row = next(iter(pair.values())).row
        cells = [row.optimizer, row.dtype.upper(), f"{row.rival.key} {row.rival.title}"]
        cells += [_ratio(pair[count]) if count in pair else "" for count in threads]
        if per_tensor:
            cells.append("; ".join(_nanoseconds(pair[count]) for count in threads if count in pair))
        else:
            cells += [f"{row.our_bytes} / {row.rival_bytes}"]
            cells += [
                "; ".join(as_percent(pair[count].share_of_stream) for count in threads if count in pair)
            ]
        taken = [(r.timing.dropped, r.timing.dropped + len(r.timing.clean)) for r in pair.values()]
        cells.append(f"{sum(t[0] for t in taken)} of {sum(t[1] for t in taken)}")
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _ratio(result: Result) -> str:
    if not result.timing.clean:
        return "no clean sample"
    text = f"**{_figure(result.ratio())}** ({_figure(result.ratio(20))} to {_figure(result.ratio(80))})"
    return text if result.verdict == "faster" else f"{text} {result.verdict}"


def _figure(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 3 else f"{ratio:.1f}"


def as_percent(share: float) -> str:
    return "-" if share != share else f"{share:.0%}"


def _nanoseconds(result: Result) -> str:
    if not result.timing.clean:
        return "no clean sample"
    record = [result.timing.seconds(who) for who in ("ours", "theirs")]
    ours, theirs = (sorted(times)[len(times) // 2] / len(result.shapes) * 1e9 for times in record)
    return f"{ours:,.0f} / {theirs:,.0f}"
