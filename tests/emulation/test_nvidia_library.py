"""The declarations of cuBLASLt (csrc/engine/cuda/lt_abi.h) against NVIDIA's header, and the attributes that
the host code sets against NVIDIA's library. Both lie in torch's wheel with CUDA."""

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from emulated import HOST_FLAGS, KINDS, ROOT, build, cuda_include

pytestmark = [
    pytest.mark.emulation,
    pytest.mark.slow,
    pytest.mark.timeout(600, func_only=True),  # building, in a fixture, takes the time that it takes
]


@pytest.fixture(scope="session")
def binary(request: pytest.FixtureRequest) -> Path:
    name, program = request.param
    return build(KINDS[name], program, ROOT / "build/emulation" / name)


def wheels(pattern: str) -> Iterator[Path]:
    """Find files of NVIDIA's Python wheels."""
    for place in filter(None, sys.path):
        yield from sorted(Path(place).glob(f"nvidia/{pattern}"))


def test_declarations_equal_the_header(tmp_path: Path) -> None:
    toolkit = cuda_include()
    if toolkit is None or not shutil.which("g++"):
        pytest.skip("needs g++ and CUDA's headers (cuda_fp16.h); set CUDA_HOME")
    headers = [*toolkit.glob("cublasLt.h"), *wheels("*/include/cublasLt.h")]
    if not headers:
        pytest.skip("needs cublasLt.h, of a CUDA toolkit or the package nvidia-cublas")
    for header in headers:
        include = [f"-I{toolkit}", f"-I{header.parent}"]
        source = str(ROOT / "tests/emulation/lt_header.cpp")
        done = subprocess.run(
            ["g++", *HOST_FLAGS, *include, "-fsyntax-only", source], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{header}\n{done.stderr}"


@pytest.mark.parametrize("binary", [("plain", "test_lt_attributes")], indirect=True)
def test_attributes_are_those_of_the_library(binary: Path) -> None:
    libraries = list(wheels("*/lib/libcublasLt.so.1?"))
    if not libraries:
        pytest.skip("needs libcublasLt.so, of the package nvidia-cublas")
    for library in libraries:
        done = KINDS["plain"].run([str(binary), str(library)])
        assert done.returncode == 0, f"{library}\n{done.stdout}{done.stderr}"
