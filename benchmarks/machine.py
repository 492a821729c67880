"""The machine of a run."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import fusedamp
import torch
from fusedamp.ops.library import cpu_target

FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "sve",
    "bf16",
)
ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Machine:
    cpu: str
    cores: int
    flags: str
    huge_pages: str
    target: str  # instruction set of fusedamp's CPU ops
    torch: str
    fusedamp: str
    commit: str
    date: str

    @property
    def kind(self) -> str:
        """Return a file name for machines of this kind."""
        plain = re.sub(r"\(.*?\)|@.*|\b(processor|cpu|v?cpus?)\b", " ", self.cpu.lower())
        return "-".join([*re.findall(r"[a-z0-9]+", plain), self.target, str(self.cores), "cores"])

    @property
    def title(self) -> str:
        cpu = re.sub(r"[(](R|TM)[)]", "", self.cpu)
        target = self.target.upper().replace("AVX512", "AVX-512")
        return f"{cpu}, {target}, {self.cores} core{'s' if self.cores > 1 else ''}"


def this_machine() -> Machine:
    info = _cpuinfo()
    present = info.get("flags", info.get("Features", "")).split()
    return Machine(
        cpu=info.get("model name") or platform.processor() or platform.machine(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        flags=" ".join(flag for flag in FLAGS if flag in present),
        huge_pages=_huge_pages(),
        target=cpu_target(),
        torch=torch.__version__,
        fusedamp=fusedamp.__version__,
        commit=_commit(),
        date=datetime.datetime.now(datetime.UTC).date().isoformat(),
    )


def _cpuinfo() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in first.split("\n") if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def _huge_pages() -> str:
    try:
        choices = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return "unknown"
    return next(iter(re.findall(r"\[(\w+)\]", choices)), "unknown")


def _commit() -> str:
    """Return the commit of the sources, with "+" if measured files changed since."""
    try:
        git = ["git", "-C", str(ROOT)]
        commit = subprocess.run(
            [*git, "rev-parse", "--short", "HEAD"], check=True, capture_output=True, text=True
        )
        sources = ["--", "csrc", "python", "benchmarks/*.py", "benchmarks/*.cpp"]
        changed = subprocess.run(
            [*git, "status", "--porcelain", *sources], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.stdout.strip() + ("+" if changed.stdout.strip() else "")
