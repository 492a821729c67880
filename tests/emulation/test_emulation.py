"""The CUDA kernels' own source on the CPU, against the CPU engine, bit for bit, under the sanitizers.

Guards: every kernel of the CUDA object over random lists of tensors (sizes, misalignment, mixes of types,
non-finite values at every position), races, missing barriers and fences, accesses outside of tensors.
mutants.py shows that it can fail.
"""

import re
import sys
from pathlib import Path

import fusedamp
import pytest

sys.path.insert(0, str(Path(__file__).parent))
from emulated import KINDS, ROOT, Kind, build, cuda_include, kernels_of, kernels_run

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.slow,
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


@pytest.mark.parametrize("name", KINDS)
def test_emulation_does_what_cuda_documents_and_stops_defects(name: str, tmp_path: Path) -> None:
    kind = kind_or_skip(name)
    binary = str(build(kind, "test_runtime", tmp_path))
    good = kind.run([binary])
    assert good.returncode == 0, good.stdout + good.stderr
    for where, defect, message in DEFECTS:
        if where == name:
            bad = kind.run([binary, defect])
            assert bad.returncode != 0, defect
            assert message in bad.stdout + bad.stderr, (defect, bad.stderr)


@pytest.mark.parametrize(
    ("name", "rounds", "largest"), [("plain", 4, 100_000), ("address", 4, 20_000), ("thread", 4, 4_000)]
)
def test_kernels_equal_the_cpu_engine(name: str, rounds: int, largest: int, tmp_path: Path) -> None:
    kind = kind_or_skip(name)
    binary = build(kind, "test_kernels", tmp_path)
    done = kind.run([str(binary), str(rounds), str(largest)])
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    library = Path(fusedamp.__file__).parent / "libfusedamp_cuda.so"
    if library.exists():  # nothing that it holds was left out
        wanted = kernels_of(library, kind)
        assert len(wanted) > 50
        assert kernels_run(binary, done.stdout) == wanted


def test_defects_are_tried_with_every_rule_that_the_tests_name() -> None:
    """mutants.py leaves the other rules out; a test that names one would not compile there."""
    folder = Path(__file__).parent
    rules = re.findall(r"FUSEDAMP_RULE\(\w+, (\w+)\)", (ROOT / "csrc/math/optimizers.def").read_text())
    (kept,) = re.findall(r"^KEPT = \((.*)\)", (folder / "mutants.py").read_text(), re.M)
    tests = (folder / "test_kernels.cpp").read_text()
    named = {rule for rule in rules if re.search(rf"\bk{rule}\b", tests)}
    assert named
    assert named <= set(re.findall(r"\w+", kept))
