"""Instructions per element (AVX2) of passes with a watch, and in small formats, whatever else runs."""

import os
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ELEMENTS = 2**15  # a chunk, in the cache
FLAGS = ["-O3", "-std=c++17", "-ffp-contract=off", "-fno-math-errno", "-fopenmp-simd", "-Wno-unknown-pragmas"]
AVX2 = ["-mavx2", "-mfma", "-mf16c", "-DFUSEDAMP_TARGET=avx2"]
# Instructions per element: plain; more of them in a step that is not due; and in one that is. Measured with
# g++ 12: 0.49, 0.22, 2.97; 0.72, 0.18, 2.71; 6.3, 0, 6.0; 9.3, 0, 5.7.
MOST = {
    ("check", "f16"): (0.6, 0.3, 3.6),
    ("check", "bf16"): (0.9, 0.3, 3.3),
    ("step", "f16"): (7.0, 0.0, 7.0),
    ("step", "bf16"): (10.5, 0.0, 7.0),
}
# Of a step on BF16 weights with split masters. Measured: 7.5 and 12.8; the general loops take twice as much.
SMALL = {"split-bf16": 8.3, "split-int8": 14.0}


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    if shutil.which("valgrind") is None:
        pytest.skip("needs valgrind")
    if shutil.which("g++") is None or os.uname().machine != "x86_64":
        pytest.skip("needs g++ on x86-64")
    folder = tmp_path_factory.mktemp("instructions")
    sources = {
        "kernels": (ROOT / "csrc/engine/cpu/kernels.cpp", AVX2),
        "engine": (ROOT / "csrc/engine/cpu/engine.cpp", []),
        "main": (ROOT / "tests/ops/pass_instructions.cpp", []),
    }
    objects = [folder / f"{name}.o" for name in sources]
    with ThreadPoolExecutor() as pool:
        for done in pool.map(
            lambda job: subprocess.run(
                ["g++", *FLAGS, *job[0][1], "-c", job[0][0], "-o", job[1]], capture_output=True, text=True
            ),
            zip(sources.values(), objects, strict=True),
        ):
            assert done.returncode == 0, done.stderr
    subprocess.run(["g++", *objects, "-o", folder / "program"], check=True)
    return folder / "program"


def per_element(program, *arguments):
    """The difference between three rounds and one, so that what precedes them does not count."""

    def executed(rounds):
        command = ["valgrind", "--tool=callgrind", "--callgrind-out-file=/dev/null", program, *arguments]
        done = subprocess.run([*command, str(rounds), str(ELEMENTS)], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return int(re.search(r"refs: +([\d,]+)", done.stderr)[1].replace(",", ""))

    return (executed(3) - executed(1)) / (2 * ELEMENTS)


@pytest.mark.parametrize("work", MOST, ids="-".join)
def test_instructions(program, work):
    plain, not_due, due = (per_element(program, *work, kind) for kind in ("plain", "not-due", "due"))
    found = plain, not_due - plain, due - plain
    assert all(got <= most + 1e-3 for got, most in zip(found, MOST[work], strict=True)), found
    assert found[2] > 1, "nothing was counted"


@pytest.mark.parametrize("states", SMALL)
def test_small_formats(states, program):
    """The loops for these formats run, and stay as short."""
    found = per_element(program, states, "bf16", "plain")
    assert found <= SMALL[states], found
