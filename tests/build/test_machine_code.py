"""Machine code of the CUDA object: wide accesses, no spills, bounded registers, FP32 steps without FP64.

Guards: a change that keeps results right and makes kernels slow, which no test on a CPU would notice.
"""

import os
import re
import shutil
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import fusedamp
import pytest

LIBRARY = Path(fusedamp.__file__).parent / "libfusedamp_cuda.so"
THREADS, REGISTERS = 256, 64 * 1024  # of a block, of a multiprocessor


def find_cuobjdump() -> str | None:
    """In CUDA_HOME, in NVIDIA's wheels, in triton's copy (which CUDA builds of torch bring), or on PATH."""
    places = [os.environ.get("CUDA_HOME", "") + "/bin", "/usr/local/cuda/bin"]
    if nvidia := find_spec("nvidia"):
        folders = map(Path, nvidia.submodule_search_locations or [])
        places += [str(found) for folder in folders for found in folder.glob("cu*/bin")]
    if (triton := find_spec("triton")) and triton.origin:
        places.append(str(Path(triton.origin).parent / "backends/nvidia/bin"))
    found = (shutil.which("cuobjdump", path=place) for place in places)
    return next(filter(None, found), None) or shutil.which("cuobjdump")


CUOBJDUMP = find_cuobjdump()
pytestmark = [
    pytest.mark.skipif(not LIBRARY.exists(), reason="built without CUDA kernels"),
    pytest.mark.skipif(
        CUOBJDUMP is None, reason="needs cuobjdump and nvdisasm (CUDA toolkit, or their wheels)"
    ),
]


def dump(option: str) -> str:
    command = [str(CUOBJDUMP), option, str(LIBRARY)]
    path = f"{Path(command[0]).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # nvdisasm is there too
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": path})
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def instructions() -> dict[tuple[str, str], Counter[str]]:
    """(architecture, kernel) -> how often each instruction occurs."""
    counts: dict[tuple[str, str], Counter[str]] = {}
    arch = kernel = ""
    for line in dump("-sass").splitlines():
        if match := re.search(r"\barch = (sm_\w+)", line):
            arch = match.group(1)
        elif match := re.search(r"Function : (\S+)", line):
            kernel = match.group(1)
            counts[arch, kernel] = Counter()
        elif match := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)", line):
            counts[arch, kernel][match.group(1)] += 1
    return counts


def kernels(instructions: dict, name: str) -> dict:
    found = {key: counts for key, counts in instructions.items() if name in key[1]}
    assert found, f"no {name} in the machine code"
    return found


def accesses(counts: Counter[str], kind: str, bits: int = 128) -> int:
    """Accesses of so many bits to global memory: LDG or STG."""
    return sum(
        n
        for instruction, n in counts.items()
        if re.fullmatch(rf"{kind}\.E\..*{bits}.*|{kind}\.E\.{bits}", instruction)
    )


def test_steps_move_16_bytes_at_a_time(instructions: dict) -> None:
    for key, counts in (kernels(instructions, "step_kernel") | kernels(instructions, "tally_kernel")).items():
        assert accesses(counts, "LDG") >= 2, key
        assert accesses(counts, "STG") >= 2, key


def test_reads_and_unscale_move_16_bytes_at_a_time(instructions: dict) -> None:
    for key, counts in kernels(instructions, "unscale_kernel").items():
        assert accesses(counts, "LDG") >= 3, key
        assert accesses(counts, "STG") >= 3, key
    for key, counts in kernels(instructions, "stats_kernelILb0E").items():
        assert accesses(counts, "LDG") >= 3 * 3 * 4, key  # norms, types, loads under way


def test_nothing_spills(instructions: dict) -> None:
    for key, counts in instructions.items():
        local = [i for i in counts if i.startswith(("LDL", "STL"))]
        assert not local, (key, local)
    usage = re.findall(r"STACK:(\d+).*?LOCAL:(\d+)", dump("-res-usage"))
    assert usage
    assert {*usage} == {("0", "0")}


def test_fp32_steps_compute_nothing_in_fp64(instructions: dict) -> None:
    for key, counts in kernels(instructions, "step_kernel").items():
        if re.search(r"EfEEv", key[1]):
            assert not [i for i in counts if re.match(r"D(FMA|ADD|MUL|SETP)|MUFU\.R(CP|SQ)64H", i)], key


def test_registers_leave_room_for_several_blocks() -> None:
    usage = re.findall(r"Function (\S*step_kernel\S*):\s+REG:(\d+)", dump("-res-usage"))
    assert usage
    tallies = re.findall(r"Function (\S*tally_kernel\S*):\s+REG:(\d+)", dump("-res-usage"))
    assert tallies
    for kernel, registers in tallies:
        assert int(registers) * THREADS <= REGISTERS / 2, (kernel, registers)
    for kernel, registers in usage:
        many = bool(re.search(r"(Adam|RmsProp)RuleILb\dELb1E|NAdamELNS0_4KindE1", kernel))
        blocks = 2 if re.search("EdEEv|4KindE3E", kernel) else (4 if "4KindE1E" in kernel else 3) - many
        assert int(registers) * THREADS <= REGISTERS / blocks, (kernel, registers)
