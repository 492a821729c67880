"""The Markdown report of the JSON: machine, outcomes, tables and failures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any

from .parts import PARTS

Result = dict[str, Any]


def markdown(about: dict[str, Any], results: dict[str, Result]) -> str:
    kind = (
        "rehearsal without a GPU: tiny sizes on the CPU, no evidence" if about["rehearsal"] else about["gpu"]
    )
    blocks = [f"# Evidence: {kind}", _facts(about), _outcomes(results)]
    for name, show in TABLES.items():
        findings = results.get(name, {}).get("findings", {})
        try:
            text = show(findings)
        except (KeyError, TypeError) as error:  # a part that ended early lacks results
            text = f"(incomplete: {error!r})"
        if text:
            blocks += [f"## {PARTS[name].title}", text]
    failed = {name: r for name, r in results.items() if r["outcome"] == "failed"}
    for name, result in failed.items():
        blocks += [f"## Failure: {PARTS[name].title}", _failure(result)]
    return "\n\n".join(blocks) + "\n"


def _facts(about: dict[str, Any]) -> str:
    shown = {key: value for key, value in about.items() if key != "rehearsal" and value not in ("", None)}
    return "\n".join(f"- {key.replace('_', ' ')}: {value}" for key, value in shown.items())


def _outcomes(results: dict[str, Result]) -> str:
    rows = [
        (PARTS[n].title, r["outcome"], r["checks"], len(r["failures"]), f"{r['seconds']:.0f} s", r["reason"])
        for n, r in results.items()
    ]
    return table(("part", "outcome", "checks", "failed", "took", "reason"), rows)


def _failure(result: Result) -> str:
    lines = [f"- {' '.join(failure.split())[:600]}" for failure in result["failures"][:40]]
    more = len(result["failures"]) - len(lines)
    if more > 0:
        lines.append(f"- and {more} more, in the JSON file")
    tail = result["tail"].strip()[-2_500:].replace("```", "'''")
    return "\n".join([*lines, "", "```", tail, "```"])


def table(heads: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    heads = list(heads)
    lines = [heads, ["---"] * len(heads), *([_cell(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    text = f"{value:.3g}" if isinstance(value, float) else str(value)
    return " ".join(text.replace("|", "/").split())[:200]


def _bandwidth(found: dict[str, Any]) -> str:
    heads = (
        "workload",
        "weights",
        "rival or format",
        "ours ms",
        "theirs ms",
        "speedup",
        "speedup on device",
    )
    heads += ("bytes ours / theirs", "GB/s (floor bytes)", "of copy")
    rows = []
    for row in found.get("rows", []):
        if "skipped" in row:
            rows.append((row["workload"], row["dtype"], row["rival"], row["skipped"], *[None] * 6))
            continue
        rows.append(
            (
                f"{row['workload']} ({row['tensors']:,} tensors, {row['numel']:,})",
                row["dtype"],
                row["rival"],
                row["seen"]["ours"]["ms"],
                row["seen"].get("theirs", {}).get("ms"),
                row["ratio_seen"],
                row["ratio_device"],
                f"{row['our_bytes']:.3g} / {row['rival_bytes'] or '-'}",
                row["gb_s"],
                f"{row['share_of_copy']:.0%}",
            )
        )
    if not rows:
        return ""
    aims = "\n".join(
        f"- {'met' if met else 'MISSED'}: {aim}" for aim, met in found.get("targets", {}).items()
    )
    copied = f"The device's copy speed: {found['copy_gb_s']:.0f} GB/s, read and written."
    return "\n\n".join([copied, table(heads, rows), aims])


def _launches(found: dict[str, Any]) -> str:
    rows = [(n, r["ours"], r["ours_engine"], r["theirs"]) for n, r in found.get("launches", {}).items()]
    host = [
        (name, r["ours_us_per_tensor"], r["theirs_us_per_tensor"])
        for name, r in found.get("host", {}).items()
    ]
    if not rows:
        return ""
    first = table(("step", "our launches", "of the engine", "their launches"), rows)
    return f"{first}\n\n{table(('host time, us per tensor', 'ours', 'theirs'), host)}"


def _training(found: dict[str, Any]) -> str:
    heads = ("recipe", "step ms", "optimizer ms", "peak GB", "first loss", "last loss")
    keys = ("recipe", "step_ms", "optimizer_phase_ms", "peak_gb", "first_loss", "last_loss")
    rows = [[run[key] for key in keys] for run in found.get("runs", [])]
    return table(heads, rows) if rows else ""


def _energy(found: dict[str, Any]) -> str:
    if not found.get("arms"):
        return ""
    keys = ("arm", "joules_per_sample", "low", "high", "ms_per_sample", "watts", "celsius")
    heads = ("arm", "J per sample", "lower quartile", "upper", "ms per sample", "W", "°C")
    arms = table(heads, [[row[key] for key in keys] for row in found["arms"]])
    verdicts = "\n".join(f"- {verdict}" for verdict in found["verdicts"])
    return f"{arms}\n\n{verdicts}\n\nOther processes on the GPU: {_cell(found['others'])}."


def _offload(found: dict[str, Any]) -> str:
    if not found.get("steps"):
        return ""
    speeds = ", ".join(f"{name} {speed:.3g}" for name, speed in found["bus_gb_s"].items())
    keys = ("format", "step", "numel", "ms", "ns_per_parameter")
    heads = ("format", "step", "parameters", "ms", "ns per parameter")
    steps = table(heads, [[row[key] for key in keys] for row in found["steps"]])
    return f"The bus, GB/s: {speeds}.\n\n{steps}\n\n{_training(found)}"


def _watch(found: dict[str, Any]) -> str:
    if not found.get("cost"):
        return ""
    ways = ("not due", "due, without updates", "due")
    heads = ("workload", "dtype", "ms without", *ways, "every=100, updates=False", "every=50")
    rows = [
        [
            *(row[key] for key in ("workload", "dtype", "plain_ms")),
            *(row["cost"][way] for way in ways),
            *(row[key] for key in ("every_100_without_updates", "every_50")),
        ]
        for row in found["cost"]
    ]
    return f"Time of an iteration with a watch, over that without.\n\n{table(heads, rows)}"


def _fusions(found: dict[str, Any]) -> str:
    if not found.get("fusions"):
        return ""
    heads = ("fusion", "layer", "dtype", "speedup", "refused")
    rows = [[r[key] for key in ("kind", "where", "dtype", "speedup", "refused")] for r in found["fusions"]]
    refused = [p for p in found.get("plans", []) if p["refused"]]
    keys = ("op", "dtype", "alignment", "m n k", "refused")
    blocks = [
        table(heads, rows),
        f"For python/fusedamp/nn/fusions.py: `{found.get('measured', '').strip()}`",
        f"Plans refused: {len(refused)} of {len(found.get('plans', []))}.",
        table(keys, [[p[key] for key in keys] for p in refused]) if refused else "",
        table(("row", "speedup"), [(r["row"], r["speedup"]) for r in found.get("rivals", [])]),
    ]
    if step := found.get("step"):
        sides = [
            (name, step[name]["step_ms"], step[name]["peak_gb"]) for name in ("torch AMP", "fusedamp.nn")
        ]
        blocks.append(table(("a step of GPT-2 small, 8 micro-batches", "ms", "peak GB"), sides))
    return "\n\n".join(filter(None, blocks))


def _suite(found: dict[str, Any]) -> str:
    if not found.get("counts"):
        return ""
    counts = ", ".join(f"{name} {count}" for name, count in found["counts"].items())
    heads = ("failing test", "cases", "the first", "at", "message")
    keys = ("test", "cases", "case", "place", "message")
    rows = [[failed[key] for key in keys] for failed in found["failing"]]
    slowest = "; ".join(f"{_cell(name)} {time}" for time, name in found["slowest"][:10])
    return "\n\n".join([counts, *([table(heads, rows)] if rows else []), f"The slowest: {slowest}"])


def _counters(found: dict[str, Any]) -> str:
    kernels = found.get("kernels", [])
    return table(kernels[0], (kernel.values() for kernel in kernels)) if kernels else ""


def _plain(found: dict[str, Any]) -> str:
    return "\n".join(f"- {key.replace('_', ' ')}: {json.dumps(value)[:300]}" for key, value in found.items())


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "build": _plain,
    "bitwise": _plain,
    "graphs": _plain,
    "sync": _plain,
    "large": _plain,
    "linear": _plain,
    "fusions": _fusions,
    "bandwidth": _bandwidth,
    "launches": _launches,
    "offload": _offload,
    "watch": _watch,
    "training": _training,
    "energy": _energy,
    "suite": _suite,
    "sanitizer": _plain,
    "counters": _counters,
}
