"""``make evidence``: tests and measures fusedamp on this machine's GPU, in at most 10 minutes.

Every part runs in a separate process with a time limit, so a crash or hang is recorded and the others
continue. Tests run concurrently if there are enough processors. The report is rewritten after each part.
Needs torch, nvcc and a C++ compiler; no downloads.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

if not __package__:  # run as a file: make the folder a package, so that its modules find each other
    sys.path[0] = str(Path(__file__).resolve().parent.parent.parent)
    __package__ = "benchmarks.evidence"

from benchmarks.evidence.parts import PARTS, Part, stages
from benchmarks.evidence.process import ROOT, execute, find_tool
from benchmarks.evidence.report import markdown

RESULTS = ROOT / "benchmarks" / "results"
PARTIAL = ROOT / "benchmarks" / "partial"  # output of rehearsals and selected parts; not committed
LIMIT = 580  # seconds in total
AT_ONCE = max(1, (os.cpu_count() or 1) // 4)  # concurrent tests
ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TORCHINDUCTOR_COMPILE_THREADS")
LEAST = 8  # minimum remaining seconds to start a part


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="make evidence",
        description=__doc__.split("\n")[0],
        epilog="Parts: " + "; ".join(f"{p.name}: {p.title}" for p in PARTS.values()) + ".",
    )
    add = parser.add_argument
    add(
        "--only",
        nargs="+",
        choices=PARTS,
        metavar="PART",
        help="only these parts of a built fusedamp",
    )
    add(
        "--rehearse",
        action="store_true",
        help="without a GPU: every part at tiny sizes on the CPU, which tests only that it runs",
    )
    add("--limit", type=float, default=LIMIT, metavar="SECONDS", help=f"for all parts (default: {LIMIT})")
    add(
        "--out",
        type=Path,
        help=f"folder for the report (default: {RESULTS.relative_to(ROOT)} for a whole run on a GPU, "
        f"{PARTIAL.relative_to(ROOT)} otherwise)",
    )
    add("--commit", help="name of the sources without git")
    options = parser.parse_args(arguments)
    if options.limit <= 0:
        parser.error(f"argument --limit: got {options.limit}; expected seconds > 0")
    options.out = options.out or (PARTIAL if options.rehearse or options.only else RESULTS)
    return options


def environment(rehearse: bool, arch: str | None) -> dict[str, str]:
    """Return environment variables: a rehearsal uses the installed fusedamp; a run uses the build in this
    folder."""
    if rehearse:
        return {}
    paths = [str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
    chosen = arch or os.environ.get("TORCH_CUDA_ARCH_LIST", "")  # container images list all architectures
    return {"PYTHONPATH": os.pathsep.join(paths), "TORCH_CUDA_ARCH_LIST": chosen}


def threads(name: str) -> dict[str, str]:
    """Return thread limits: tests run concurrently, so more threads would only wait."""
    return dict.fromkeys(ONE_THREAD, "1") if name in PARTS and PARTS[name].proves else {}


def perform(name: str, seconds: float, rehearse: bool, env: dict[str, str]) -> dict[str, Any]:
    """Run one part in its process. Its results before a crash or the time limit count."""
    with tempfile.TemporaryDirectory(prefix="evidence-") as folder:
        file = Path(folder) / "result.json"
        command = [sys.executable, "-m", "benchmarks.evidence.part", name, "--result", str(file)]
        command += ["--device", "cpu" if rehearse else "cuda", "--seconds", str(seconds)]
        done = execute([*command, *(["--rehearse"] if rehearse else [])], seconds, env | threads(name))
        try:
            result = json.loads(file.read_text())
        except (OSError, ValueError):
            result = {"outcome": "unfinished", "reason": "", "checks": 0, "failures": [], "findings": {}}
    if result["outcome"] == "unfinished" or (done.code and result["outcome"] != "failed"):
        result |= {"outcome": "failed", "reason": done.verdict or "ended without a result"}
    return result | {"seconds": done.seconds, "tail": done.tail}


def commit() -> str:
    try:
        git = ["git", "-C", str(ROOT)]
        head = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        )
        sources = ["--", "csrc", "python", "benchmarks/*.py", "setup.py"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", *sources], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+" if changed.stdout.strip() else "")


def nvcc_version() -> str:
    try:
        text = subprocess.run(
            [find_tool("nvcc") or "nvcc", "--version"], capture_output=True, text=True, timeout=20
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
    return next(iter(re.findall(r"V([\d.]+)", text)), "")


def write(out: Path, about: dict[str, Any], results: dict[str, Any]) -> Path:
    slug = re.sub(r"[^a-z0-9]+", "-", about["gpu"].lower()).strip("-")
    stem = out / f"{slug}-{about['date']}"
    out.mkdir(parents=True, exist_ok=True)
    stem.with_name(stem.name + ".json").write_text(
        json.dumps({"about": about, "parts": results}, indent=1) + "\n"
    )
    stem.with_name(stem.name + ".md").write_text(markdown(about, results))
    return stem


def skipped(reason: str) -> dict[str, Any]:
    nothing = {"checks": 0, "failures": [], "findings": {}, "seconds": 0.0, "tail": ""}
    return {"outcome": "skipped", "reason": reason, **nothing}


def show(part: Part, result: dict[str, Any]) -> None:
    print(f"{part.title}: {result['outcome']} ({result['seconds']:.0f} s) {result['reason']}", flush=True)
    for failure in result["failures"][:5]:
        print(f"    {' '.join(failure.split())[:300]}", flush=True)


def main(arguments: list[str] | None = None) -> int:
    options = parse(arguments)
    end = time.monotonic() + options.limit
    probe = perform("probe", min(60.0, options.limit), options.rehearse, {})
    machine = probe["findings"]
    if probe["outcome"] != "passed":
        why = probe["reason"] if probe["outcome"] == "skipped" else f"torch does not work: {probe['reason']}"
        print(
            f"make evidence: {why}. (--rehearse runs every part at tiny sizes on the CPU.)", file=sys.stderr
        )
        return 2
    about = {
        "rehearsal": options.rehearse,
        "commit": options.commit or commit(),
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        **machine,
        "nvcc": nvcc_version(),
    }
    env = environment(options.rehearse, machine.get("arch"))
    results: dict[str, Any] = {}

    def attempt(part: Part) -> tuple[Part, dict[str, Any]]:
        seconds = min(part.seconds, end - time.monotonic())
        if results.get("build", {}).get("outcome") == "failed":
            return part, skipped("the build failed")
        if seconds < LEAST:
            return part, skipped(f"the limit of {options.limit:g} s was reached")
        return part, perform(part.name, seconds, options.rehearse, env)

    for stage in stages(options.only or PARTS):
        with ThreadPoolExecutor(AT_ONCE) as pool:
            for done in as_completed([pool.submit(attempt, part) for part in stage]):
                part, result = done.result()
                results[part.name] = result
                stem = write(options.out, about, {name: results[name] for name in PARTS if name in results})
                show(part, result)
    print(f"Written: {stem}.json and .md")
    return 1 if any(result["outcome"] == "failed" for result in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
