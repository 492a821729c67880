"""The CUDA kernels' own source on the CPU, against the CPU engine, bit for bit, under the sanitizers.

Guards: every kernel of the CUDA object over random lists of tensors (sizes, misalignment, mixes of types,
non-finite values at every position), races, missing barriers and fences, accesses outside of tensors.
mutants.py shows that it can fail.
"""

import os
import re
import sys
from pathlib import Path

import fusedamp
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from emulated import (
    KINDS,
    ROOT,
    Kind,
    build,
    cuda_include,
    is_fresh,
    kernels_of,
    kernels_run,
    make,
)

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.slow,
    pytest.mark.timeout(600, func_only=True),  # building, in a fixture, takes the time that it takes
    pytest.mark.skipif(cuda_include() is None, reason="needs CUDA's headers (cuda_fp16.h); set CUDA_HOME"),
]

# The defects of test_runtime.cpp, who stops them first, and what it says.
DEFECTS = [
    ("plain", "leaves_before_a_barrier", "threads left the kernel before the block barrier"),
    ("plain", "waits_at_two_barriers", "threads wait at different barriers"),
    ("plain", "names_absent_lanes", "deadlock"),
    ("plain", "reads_a_lane_outside_the_mask", "does not name"),
    ("address", "writes_past_shared_memory", "out of bounds"),
    ("thread", "forgets_a_barrier", "data race"),
    ("thread", "counts_without_atomics", "data race"),
    ("thread", "reads_results_without_a_fence", "data race"),
]


def kind_or_skip(name: str) -> Kind:
    kind = KINDS[name]
    if kind.compiler() is None:
        pytest.skip(kind.missing)
    return kind


@pytest.fixture(scope="session")
def binary(request: pytest.FixtureRequest) -> Path:
    """A program of one kind of build, compiled only where its sources or flags have changed since the last
    run."""
    name, program = request.param
    return build(kind_or_skip(name), program, ROOT / "build/emulation" / name)


@pytest.mark.parametrize(
    ("name", "binary"), [(n, (n, "test_runtime")) for n in KINDS], indirect=["binary"], ids=KINDS
)
def test_emulation_does_what_cuda_documents_and_stops_defects(name: str, binary: Path) -> None:
    kind = KINDS[name]
    good = kind.run([str(binary)])
    assert good.returncode == 0, good.stdout + good.stderr
    for where, defect, message in DEFECTS:
        if where == name:
            bad = kind.run([str(binary), defect])
            assert bad.returncode != 0, defect
            assert message in bad.stdout + bad.stderr, (defect, bad.stderr)


SIZES = {"plain": (4, 100_000), "address": (4, 20_000), "thread": (4, 4_000)}  # rounds, the largest tensor


@pytest.mark.parametrize(
    ("name", "binary"), [(n, (n, "test_kernels")) for n in KINDS], indirect=["binary"], ids=KINDS
)
def test_kernels_equal_the_cpu_engine(name: str, binary: Path) -> None:
    kind, (rounds, largest) = KINDS[name], SIZES[name]
    done = kind.run([str(binary), str(rounds), str(largest)])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    library = Path(fusedamp.__file__).parent / "libfusedamp_cuda.so"
    if library.exists():  # nothing that it holds was left out
        wanted = kernels_of(library, kind)
        assert len(wanted) > 50
        assert kernels_run(binary, done.stdout) == wanted


def test_nothing_is_built_twice(tmp_path: Path) -> None:
    """A target is rebuilt if and only if a header, a flag or the list of its parts changed."""
    header, source, target = tmp_path / "a.h", tmp_path / "a.cpp", tmp_path / "a.o"
    header.write_text("constexpr int kA = 1;\n")
    source.write_text('#include "a.h"\nint a() { return kA; }\n')
    os.utime(header, (1, 1))
    os.utime(source, (1, 1))

    def made(*flags: str) -> bool:
        if target.exists():
            os.utime(target, (2, 2))
        make(["g++", *flags, str(source), "-MD", "-MF", str(tmp_path / "a.o.d"), "-c"], target)
        return target.stat().st_mtime != 2

    depends = tmp_path / "a.o.d"
    assert made()
    depends.write_text(f"{target}: {source} {header}\n")  # the compiler's own headers are newer than 1970
    assert not made()
    os.utime(header, (3, 3))
    assert made()
    depends.write_text(f"{target}: {source} {header}\n")
    os.utime(header, (1, 1))
    assert not made()
    assert made("-O2")
    binary = tmp_path / "a.so"
    make(["g++", "-shared", str(target)], binary, [target])
    assert is_fresh(binary, (tmp_path / "a.so.recipe").read_text())
    os.utime(target)
    assert not is_fresh(binary, (tmp_path / "a.so.recipe").read_text())


def test_defects_are_tried_with_every_rule_that_the_tests_name() -> None:
    """mutants.py leaves the other rules out; a test that names one would not compile there."""
    folder = Path(__file__).parent
    rules = re.findall(r"FUSEDAMP_RULE\(\w+, (\w+)\)", (ROOT / "csrc/math/optimizers.def").read_text())
    (kept,) = re.findall(r"^KEPT = \((.*)\)", (folder / "mutants.py").read_text(), re.M)
    tests = "".join(
        path.read_text() for path in (*folder.glob("test_kernels.cpp"), *folder.glob("*_tests.h"))
    )
    named = {rule for rule in rules if re.search(rf"\bk{rule}\b", tests)}
    assert named
    assert named <= set(re.findall(r"\w+", kept))
