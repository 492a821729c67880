"""Writes the tables of README.md and docs/ from committed results and from the package itself.

python benchmarks/pages.py [--check]

A table stands between `<!-- table: name -->` and `<!-- end -->`, and so do README's badges. If pyproject.toml
names the repository, README's links become absolute: a package index shows it without the files beside it.
`--check` writes nothing, and exits with 1
if a page differs. Pictures: `python benchmarks/pictures.py`; numbers in sentences: `benchmarks/sentences.py`.
"""

from __future__ import annotations

import argparse
import csv
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from decimal import ROUND_HALF_UP, Decimal
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
H200 = RESULTS / "nvidia-h200-2026-11-26.json"
EPYC = RESULTS / "amd-epyc-avx512-2-cores.csv"
POLICIES = RESULTS / "scale-policies.csv"
EPYC_CPP = RESULTS / "amd-epyc-avx512-2-cores-cpp.csv"
EPYC_NUMERICS = RESULTS / "amd-epyc-avx512-2-cores-numerics.csv"
EPYC_STORAGE = RESULTS / "amd-epyc-avx512-2-cores-storage.csv"
PARITY = ROOT / "docs" / "parity.md"  # a result that is a page
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT.get("urls", {}).get("Repository")
RELATIVE = re.compile(r"(!?)\[((?:!\[[^]]*\]\([^)]*\)|[^]])*)\]\((?!https?:|#)([^)]+)\)")
PLACE = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end -->)", re.S)

STORAGE = {  # of AdamW: the words of the tables, and the options
    "FP32 master weights and states": {},
    '`master_weights="split"`': {"master_weights": "split"},
    "and `state_dtype=torch.bfloat16`": {"master_weights": "split", "state_dtype": "bfloat16"},
    'and `state_dtype="int8"`': {"master_weights": "split", "state_dtype": "int8"},
    '`master_weights="none", stochastic_rounding=True, state_dtype="int8"`': {
        "master_weights": "none",
        "stochastic_rounding": True,
        "state_dtype": "int8",
    },
}
RECIPES = {  # of the GPU report: their names there and on the pages
    "torch AMP, FP16 autocast, fused AdamW": "torch AMP, FP16 autocast, fused AdamW",
    "fusedamp, FP16 autocast": "fusedamp, FP16 autocast",
    "fusedamp, FP16 weights with masters": "fusedamp, FP16 weights",
    "torch AMP, BF16 autocast, fused AdamW": "torch AMP, BF16 autocast, fused AdamW",
    "fusedamp, BF16 weights with masters": "fusedamp, BF16 weights",
}
COMPRESSED = ("split masters", "split masters, BF16 states", "split masters, 8-bit states")


def evidence() -> dict[str, Any]:
    """Return the findings of the GPU report, by part."""
    parts = json.loads(H200.read_text())["parts"]
    return {name: part["findings"] for name, part in parts.items()}


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def markdown(heads: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    lines = [list(heads), ["---"] * len(list(heads)), *map(list, body)]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def speedup(value: float | str | None) -> str:
    if value is None:
        return "-"
    number = float(value)
    return f"{number:.2f}" if number < 1.2 else f"{number:.1f}" if number < 9.95 else f"{number:.0f}"


def _rounded(number: str) -> str:
    return str(Decimal(number).quantize(Decimal("0.01"), ROUND_HALF_UP))


# Tables ---------------------------------------------------------------------------------------


def speed_on_the_gpu() -> str:
    workloads = {
        "W1": "one tensor of 10^9 elements",
        "W4 GPT-2 XL": "GPT-2 XL",
        "W2": "GPT-2 small",
        "W3": "2,000 small tensors",
    }
    baselines = {
        ("fp32", "P1 torch fused"): "FP32, `fused=True`",
        ("bf16", "P3 masters by hand"): "BF16, manual FP32 master weights",
        ("fp16", "P4 masters by hand"): "FP16, manual FP32 master weights",
    }
    found = {
        (row["workload"], row["dtype"], row["rival"]): row["ratio_seen"]
        for row in evidence()["bandwidth"]["rows"]
    }
    body = [
        [title, *(speedup(found.get((name, *key))) for name in workloads)] for key, title in baselines.items()
    ]
    return markdown(["torch's AdamW", *workloads.values()], body)


def speed_on_the_cpu() -> str:
    workloads = {"W1": "one tensor of 4 * 10^7", "W2": "GPT-2 small", "W3": "2,000 small tensors"}
    baselines = {
        "P1": "FP32, `fused=True`",
        "P2": "FP32, `foreach=True`",
        "P6": "FP32, compiled",
        "P3": "BF16, manual FP32 master weights",
        "P4": "FP16, manual FP32 master weights",
    }
    found = {
        (row["workload"], row["rival"], row["threads"]): row["ratio_p50"]
        for row in rows(EPYC)
        if row["optimizer"] == "adamw"
    }
    body = []
    for key, title in baselines.items():
        cells = []
        for name in workloads:
            one, two = (found.get((name, key, threads)) for threads in "12")
            cells.append("-" if one is None else f"{speedup(one)} ({speedup(two)})")
        body.append([title, *cells])
    return markdown(["torch's AdamW", *workloads.values()], body)


def bytes_per_parameter() -> str:
    import fusedamp
    import torch

    def cells(row: fusedamp.Memory) -> list[str]:
        parts = (row.weights, row.gradients, row.masters, row.states, row.total)
        return [f"{part / 2**20:.2f}".rstrip("0").rstrip(".") for part in parts]

    count, dtype = 2**20, torch.bfloat16
    plain = fusedamp.estimate(count, fusedamp.optim.AdamW, dtype=torch.float32).rows
    body = [["torch AMP, FP32 weights", *cells(next(row for row in plain if "plain torch" in row.name))]]
    for title, options in STORAGE.items():
        row = fusedamp.estimate(count, fusedamp.optim.AdamW, dtype=dtype, **options).rows[0]
        body.append([title, *cells(row)])
    return markdown(["AdamW", "weights", "gradients", "master weights", "states", "sum"], body)


def speed_of_storage() -> str:
    seen = {
        row["rival"]: row["seen"]["ours"]["ms"]
        for row in evidence()["bandwidth"]["rows"]
        if row["workload"] == "W1" and row["dtype"] == "bf16"
    }
    base = seen["P3 masters by hand"]
    on_cpu = {(row["mode"], row["threads"]): row["ratio_p50"] for row in rows(EPYC_STORAGE)}
    titles = dict(zip(COMPRESSED, list(STORAGE)[1:4], strict=True))
    body = []
    for mode, title in titles.items():
        name = f"adamw, BF16, {mode}" + ("" if "states" in mode else ", FP32 states")
        cpu = [_rounded(on_cpu[name, threads]) for threads in "12"]
        body.append([title, f"{base / seen[mode]:.2f}", *cpu])
    return markdown(["AdamW, BF16 weights", "H200", "EPYC, 1 thread", "EPYC, 2 threads"], body)


def step_of_gpt2() -> str:
    runs = {run["recipe"]: run for run in evidence()["training"]["runs"]}
    body = [
        [title, *(f"{runs[name][key]:.{digits}f}" for key, digits in _COLUMNS)]
        for name, title in RECIPES.items()
    ]
    return markdown(
        ["GPT-2 small, 8 x 1,024 tokens", "training step, ms", "optimizer step, ms", "peak, GB"], body
    )


_COLUMNS = (("step_ms", 1), ("optimizer_phase_ms", 2), ("peak_gb", 1))
_STORAGE_OPTIONS = ("master_weights", "state_dtype", "stochastic_rounding", "rounding_seed")
_WITHOUT_EFFECT = ("foreach", "fused", "capturable", "differentiable")


def optimizers() -> str:
    import fusedamp
    import torch

    body = []
    names = [n for n in fusedamp.optim.__all__ if hasattr(getattr(fusedamp.optim, n), "states")]
    for name in sorted(names, key=str.lower):
        parameters = inspect.signature(getattr(fusedamp.optim, name)).parameters
        shown = [
            f"{p.name}={str(p.default).removeprefix('torch.')}"
            for p in parameters.values()
            if p.name not in ("params", *_STORAGE_OPTIONS, *_WITHOUT_EFFECT)
        ]
        counterpart = f"`torch.optim.{name}`" if hasattr(torch.optim, name) else "-"
        compresses = "yes" if getattr(fusedamp.optim, name).can_compress else "no"
        body.append([f"`{name}`", counterpart, "`" + ", ".join(shown) + "`", compresses])
    return markdown(["optimizer", "same arguments as", "options and defaults", "16- and 8-bit storage"], body)


def badges(repository: str | None = REPOSITORY) -> str:
    """Return the badges of README.md, from pyproject.toml; that of CI needs a repository."""
    torch = next(need for need in PROJECT["dependencies"] if need.startswith("torch"))
    shown = {
        "version": (PROJECT["version"], "CHANGELOG.md"),
        "Python": (PROJECT["requires-python"], "pyproject.toml"),
        "torch": (torch.removeprefix("torch"), "pyproject.toml"),
        "license": (PROJECT["license"], "LICENSE"),
    }
    lines = []
    if repository:
        workflow = f"{repository}/actions/workflows/ci.yml"
        lines.append(f"[![CI]({workflow}/badge.svg)]({workflow})")
    for name, (value, link) in shown.items():
        text = value.replace("-", "--").replace(">=", "%E2%89%A5")
        lines.append(f"[![{name} {value}](https://img.shields.io/badge/{name}-{text}-blue)]({link})")
    return "\n".join(lines) + "\n"


def scale_policies() -> str:
    """Skips / bits of torch's policy and of ours; the rows of one network come before those of the other."""
    cells: dict[str, list[str]] = {}
    for row in rows(POLICIES):
        if row["policy"] in ("torch", "headroom"):
            cells.setdefault(row["scenario"], []).append(f"{row['skips']} / {float(row['bits']):.1f}")
    heads = ("", "GPT: torch", "GPT: headroom", "conv net: torch", "conv net: headroom")
    return markdown(heads, ((name, *found) for name, found in cells.items()))


def cost_of_a_watch() -> str:
    names = {"W1": "one tensor of 4 * 10^7 elements", "W3": "2,000 small tensors"}
    found = rows(EPYC_NUMERICS)
    body = []
    for first in (row for row in found if row["step"] == "not due"):
        same = [row for row in found if all(row[k] == first[k] for k in ("workload", "dtype", "scaler"))]
        cost = {row["step"]: float(row["cost_p50"]) for row in same}
        means = [(99 * cost["not due"] + cost["due, without updates"]) / 100]
        means.append((49 * cost["not due"] + cost["due"]) / 50)
        scaler = "scaler" if first["scaler"] == "True" else "no scaler"
        title = f"{names[first['workload']]}, {first['dtype']}, {scaler}"
        body.append([title, *(f"{cost[step]:.2f}" for step in cost), *(f"{mean:.2f}" for mean in means)])
    heads = ("AdamW with masters, one thread of an AMD EPYC", "not due", "due, `updates=False`", "due")
    return markdown((*heads, "`every=100, updates=False`", "`every=50`"), body)


def speed_in_cpp() -> str:
    baselines = {"optim": "`torch::optim::AdamW`", "fused": "`at::_fused_adamw_` by hand"}
    found = {(row["baseline"], row["numel"], row["row"]): row["ratio_p50"] for row in rows(EPYC_CPP)}
    body = [
        [
            f"{title}, tensors of {numel} elements",
            *(speedup(found[key, numel, row]) for row in ("step", "scaler")),
        ]
        for key, title in baselines.items()
        for numel in ("16", "512")
    ]
    return markdown(["2,000 FP32 tensors", "step", "unscaling, clipping, step, scale update"], body)


TABLES: dict[str, Callable[[], str]] = {
    "speed-gpu": speed_on_the_gpu,
    "speed-cpu": speed_on_the_cpu,
    "speed-cpp": speed_in_cpp,
    "step-gpt2": step_of_gpt2,
    "bytes": bytes_per_parameter,
    "storage-speed": speed_of_storage,
    "optimizers": optimizers,
    "scale-policies": scale_policies,
    "watch-cost": cost_of_a_watch,
    "badges": badges,
}


def absolute(text: str, repository: str) -> str:
    """Return a page of the top folder with links into the repository instead of relative ones."""
    return RELATIVE.sub(
        lambda m: f"{m[1]}[{m[2]}]({repository}/{'raw' if m[1] else 'blob'}/main/{m[3]})", text
    )


def written(page: Path) -> str:
    """Return the text of a page with its tables made again."""
    text = PLACE.sub(lambda match: match[1] + TABLES[match[2]]() + match[3], page.read_text())
    return absolute(text, REPOSITORY) if REPOSITORY and page.name == "README.md" else text


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true")
    check = parser.parse_args(arguments).check
    stale = 0
    for page in PAGES:
        if (new := written(page)) != page.read_text():
            stale += 1
            print(f"{page.relative_to(ROOT)}: {'differs' if check else 'written'}")
            if not check:
                page.write_text(new)
    return int(check and stale > 0)


if __name__ == "__main__":
    sys.exit(main())
