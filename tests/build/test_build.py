"""Decisions of setup.py, without compiling: stand-ins for the compilers record their arguments.

And what the installed build says of itself and links to.
"""

import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import fusedamp
import pytest
from fusedamp import _C
from fusedamp.ops import library

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = Path(fusedamp.__file__).parent

# Writes what a compiler would: the object, and the list of files that it read.
COMPILER = r"""#!/bin/sh
case "$*" in
  *--list-gpu-code*) echo "sm_80 sm_90 sm_100"; exit ;;
  *--version*) echo "Cuda compilation tools, release 13.0, V13.0.1"; exit ;;
esac
echo "${0##*/} $*" >> "${0%/*}/calls"
while [ $# -gt 0 ]; do
  case "$1" in
    -o) : > "$2" ;;
    -c) source=$2 ;;
    -MF) depends=$2 ;;
  esac
  shift
done
[ -z "$depends" ] || echo "object: $source" > "$depends"
"""
# setup.py sees no nvcc, compiler or torch but those of the test, wherever else this machine has them.
DRIVER = """
import importlib.util, os, runpy, shutil, sys, sysconfig
which, find_spec, get_path, here = shutil.which, importlib.util.find_spec, sysconfig.get_path, os.getcwd()

def which_here(name, mode=1, path=None):
    found = which(name, mode, path)
    return found if found and found.startswith(here) else None

def path_here(kind, *args, **kwargs):
    return f"{here}/site" if kind in ("platlib", "purelib") else get_path(kind, *args, **kwargs)

shutil.which, sysconfig.get_path = which_here, path_here
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find_spec(name, *more)
sys.argv = ["setup.py", "build_ext", "--inplace"]
runpy.run_path("setup.py", run_name="__main__")
"""


class Sandbox:
    """A copy of the sources with a stand-in torch and stand-in compilers."""

    def __init__(self, folder, torch="2.13.0", compilers=("g++",)):
        self.folder, self.bin = folder, folder / "bin"
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, folder)
        (folder / "python/fusedamp").mkdir(parents=True)
        (folder / "python/fusedamp/__init__.py").touch()
        self.bin.mkdir()
        for name in compilers:
            (self.bin / name).write_text(COMPILER)
            (self.bin / name).chmod(0o755)
        if torch:
            (folder / "site/torch/include").mkdir(parents=True)
            (folder / "site/torch/version.py").write_text(f"__version__ = '{torch}'\n")

    def build(self, **variables):
        """Return the exit code and the output."""
        keep = {
            k: v for k, v in os.environ.items() if not k.startswith(("FUSEDAMP_", "CUDA", "TORCH_", "CXX"))
        }
        environment = keep | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables
        (self.bin / "calls").write_text("")
        done = subprocess.run(
            [sys.executable, "-c", DRIVER], cwd=self.folder, env=environment, capture_output=True, text=True
        )
        return done.returncode, done.stdout + done.stderr

    def calls(self):
        return (self.bin / "calls").read_text().splitlines()


pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")

REFUSALS = {
    "no torch": (dict(torch=None), {}, "torch was not found; its headers are needed.", "pip install torch"),
    "old torch": (dict(torch="2.10.1+cu126"), {}, "torch 2.10.1+cu126 is too old; expected", "install -U"),
    "no compiler": (dict(compilers=()), {}, "no C++ compiler (g++) was found.", "or set CXX"),
    "no such CXX": ({}, dict(CXX="clang++-99"), "no C++ compiler (clang++-99) was found.", "or set CXX"),
    "CUDA=1": ({}, dict(FUSEDAMP_CUDA="1"), "FUSEDAMP_CUDA=1, but no nvcc was found.", "set CUDA_HOME"),
    "CUDA=yes": ({}, dict(FUSEDAMP_CUDA="yes"), "FUSEDAMP_CUDA=yes is unknown; expected auto, 0 or 1.", ""),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSALS)
def test_one_line_says_what_is_missing(name, tmp_path):
    """Exit code 1, one line with the problem and a fix, no traceback, nothing compiled."""
    sandbox_options, variables, what, way_out = REFUSALS[name]
    sandbox = Sandbox(tmp_path, **sandbox_options)
    code, text = sandbox.build(**variables)
    assert code == 1
    assert "Traceback" not in text
    line = next(line for line in text.splitlines() if line.startswith("fusedamp: ") and what in line)
    assert way_out in line
    assert not sandbox.calls()


@pytest.mark.parametrize(
    ("wish", "why"), [("auto", "no nvcc; install the CUDA toolkit"), ("0", "FUSEDAMP_CUDA=0")]
)
def test_a_cpu_build_says_that_it_is_one(wish, why, tmp_path):
    sandbox = Sandbox(tmp_path, compilers=("g++",) if wish == "auto" else ("g++", "nvcc"))
    code, text = sandbox.build(FUSEDAMP_CUDA=wish)
    assert code == 0, text
    assert [line for line in text.splitlines() if f"building without CUDA kernels ({why}" in line]
    made = {p.name.partition(".")[0] for p in (tmp_path / "python/fusedamp").glob("*.so")}
    assert made == {"libfusedamp_cpu", "_C"}


def test_flags(tmp_path):
    """One object per instruction set, honest floats everywhere, the stable ABI's target in every op
    object."""
    sandbox = Sandbox(tmp_path)
    assert sandbox.build()[0] == 0
    compiled = [call for call in sandbox.calls() if " -c " in call]
    assert all("-ffp-contract=off" in call and "fast-math" not in call for call in compiled)
    kernels = [call for call in compiled if "cpu/kernels.cpp" in call]
    assert len(kernels) == len(_C.build_info()["cpu_targets"])
    assert all("-mavx512f" not in call for call in compiled if "FUSEDAMP_TARGET=avx512" not in call)
    assert all(
        "-DTORCH_TARGET_VERSION=0x020b000000000000" in call for call in compiled if "csrc/ops/" in call
    )


@pytest.mark.parametrize(
    ("asked", "wanted"),
    [
        ("", ["compute_80,code=sm_80", "compute_90,code=sm_90", "compute_100,code=sm_100"]),
        ("8.6;9.0+PTX", ["compute_86,code=sm_86", "compute_90,code=sm_90", "compute_90,code=compute_90"]),
        ("7.5 8.0", ["compute_75,code=sm_75", "compute_80,code=sm_80"]),
    ],
)
def test_cuda_is_built_where_nvcc_is_found(asked, wanted, tmp_path):
    """GPU or not; for the architectures asked for, or for all of ours that this nvcc knows."""
    sandbox = Sandbox(tmp_path, compilers=("g++", "nvcc"))
    code, text = sandbox.build(TORCH_CUDA_ARCH_LIST=asked, FUSEDAMP_CUDA="1")
    assert code == 0, text
    assert "building without CUDA" not in text
    kernels = [call for call in sandbox.calls() if call.startswith("nvcc") and ".cu " in call]
    assert kernels
    for call in kernels:
        assert "--fmad=false" in call
        assert [a.removeprefix("-gencode=arch=") for a in call.split() if a.startswith("-gencode")] == wanted
    assert (tmp_path / "python/fusedamp/libfusedamp_cuda.so").exists()


def test_compiles_only_what_changed(tmp_path):
    sandbox = Sandbox(tmp_path)
    sandbox.build()
    assert sandbox.build()[0] == 0
    assert not [call for call in sandbox.calls() if " -c " in call]
    os.utime(tmp_path / "csrc/ops/rows.cpp", (2**31, 2**31))
    sandbox.build()
    compiled = [call for call in sandbox.calls() if " -c " in call]
    assert len(compiled) == 1
    assert "csrc/ops/rows.cpp" in compiled[0]


def test_a_compiler_error_is_shown(tmp_path):
    sandbox = Sandbox(tmp_path)
    (sandbox.bin / "g++").write_text("#!/bin/sh\necho 'rows.cpp:7: no such thing' >&2\nexit 1\n")
    code, text = sandbox.build()
    assert code == 1
    assert "failed:" in text
    assert "rows.cpp:7: no such thing" in text
    assert "Traceback" not in text


def test_build_info():
    info = _C.build_info()
    assert info["version"] == fusedamp.__version__ == importlib.metadata.version("fusedamp")
    assert info["torch_abi_target"] == "2.11"
    assert tuple(map(int, info["torch"].split(".")[:2])) >= (2, 11)
    assert "baseline" in info["cpu_targets"]
    assert library.cpu_target() in info["cpu_targets"]
    assert bool(info["nvcc"]) == bool(info["cuda_archs"]) == (PACKAGE / "libfusedamp_cuda.so").exists()
    assert info["compiler"].startswith("g++ ")


def test_a_build_in_place_needs_no_metadata():
    """It is what a machine without pip's network has."""
    code = "import torch, importlib.metadata as m; m.distribution = m.version = None; import fusedamp"
    subprocess.run([sys.executable, "-c", code], check=True)


OBJECTS = sorted(PACKAGE.glob("*.so"))
needs_binutils = pytest.mark.skipif(not shutil.which("readelf"), reason="needs binutils")


def output_of(*command):
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


@needs_binutils
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name)
def test_objects_need_torchs_stable_abi_only(path):
    """No C++ symbol of torch, which changes with every release; no path of the machine that built it."""
    symbols = output_of("nm", "-D", "--undefined-only", path)
    unstable = [
        s for s in symbols.split() if s.startswith(("_ZN2at", "_ZNK2at", "_ZN3c10", "_ZNK3c10", "_ZN5torch"))
    ]
    assert not unstable
    dynamic = output_of("readelf", "-d", path)
    assert "RPATH" not in dynamic
    assert "RUNPATH" not in dynamic
    for name in ("libc10", "libtorch_python", "libpython", "libcudart"):
        assert name not in dynamic


@needs_binutils
def test_no_instruction_set_leaks_into_shared_functions():
    """Every weak (shared, inline) function that the kernels' objects export could be the AVX-512 one for
    all."""
    symbols = output_of("nm", "-C", "--defined-only", PACKAGE / "libfusedamp_cpu.so")
    weak = [line for line in symbols.splitlines() if " W " in line and "avx" in line]
    assert not weak
