"""The C++ benchmark: its program builds, both sides of each row compute the same, the report has all rows."""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cmake_package import CMAKE, CXX

for extra in ("matplotlib", "numpy", "rich"):
    pytest.importorskip(extra, reason=f"{extra} is not installed (extra: bench)")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # the benchmarks are not part of the package

from benchmarks import cpp  # noqa: E402
from benchmarks.machine import this_machine  # noqa: E402
from benchmarks.timing import Sample, Timing, Triple  # noqa: E402


@pytest.mark.skipif(not CMAKE or not CXX, reason="needs CMake and a C++ compiler")
def test_the_program_times_every_row(tmp_path, monkeypatch):
    """It ends with an error if the weights of the sides differ after its warm-up."""
    monkeypatch.setenv("PATH", f"{Path(CMAKE).parent}:{Path(sys.executable).parent}", prepend=":")
    program = cpp.build(tmp_path, "-O0")
    for phase in cpp.PHASES:
        for baseline in cpp.BASELINES:
            timing = cpp.timed(program, phase, baseline, 16, 3, samples=2)
            assert len(timing.clean) + timing.dropped >= 2
            assert all(part > 0 for triple in timing.clean for part in (triple.ours.cpu, triple.theirs.cpu))
        for side in ("ours", *cpp.BASELINES):
            assert cpp.output(program, "once", phase, side, 16, 3) == ""
    with pytest.raises(subprocess.CalledProcessError):
        cpp.output(program, "time")


def test_disturbed_pairs_are_dropped(monkeypatch):
    clean, lost = "1e-2 1e-2 0 3e-2 3e-2 0 ", "1e-2 1e-2 0 3e-2 2e-2 1e-2 "
    monkeypatch.setattr(cpp, "output", lambda *arguments: "\n".join([clean, lost, clean, clean, ""]))
    timing = cpp.timed(Path("program"), "step", "optim", 16, 3, samples=2)
    assert (len(timing.clean), timing.dropped) == (2, 1)
    assert timing.ratios() == pytest.approx([3.0, 3.0])


def test_instructions_without_valgrind_are_not_a_number(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert math.isnan(cpp.instructions(Path("program"), "step", "ours", 16, 3))


def test_the_report_has_every_row():
    timing = Timing(1, [Triple(Sample(1.0, 1.0, 0.0), Sample(4.0, 4.0, 0.0), None)] * 3)
    numbers = dict(ours=0.5, theirs=2.0, instructions=10.0, instructions_of_torch=1234.5)
    records = [
        cpp.record(phase, timing, baseline=baseline, numel=16, tensors=2_000, **numbers)
        for phase in cpp.PHASES
        for baseline in cpp.BASELINES
    ]
    empty = dict(baseline="torch/torch.h", numel="", tensors="")
    records += [cpp.record(f"compile {side}", timing, **empty, **numbers) for side in cpp.COMPILED_ROWS]
    text = cpp.report(records, this_machine())
    assert text.count("| 2,000 of 16 elements | step | ") == 2
    assert text.count("**4.00** (4.00 to 4.00) | 0.50 | 2.00 | 10 | 1,234 |") == 4
    assert "uses fusedamp, compiles in **0.25** (0.25 to 0.25) times" in text
    assert "once in a program, compile in **0.25** (0.25 to 0.25) times" in text
