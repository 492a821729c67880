"""Decisions of setup.py, without compiling: stand-ins for the compilers record their arguments.

And what the installed build says of itself and links to.
"""

import ctypes
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from unittest.mock import Mock
from zipfile import ZipFile

import fusedamp
import pytest
import torch
from build_sandbox import ROOT, Sandbox
from fusedamp import _C
from fusedamp.ops import library

PACKAGE = Path(fusedamp.__file__).parent
OBJECT_NAMES = ("_C", "libfusedamp_cpu", "libfusedamp_cuda")

pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").exists(), reason="not a source checkout")

REFUSALS = {
    "no torch": (dict(torch=None), {}, "torch was not found; its headers are needed.", "pip install torch"),
    "old torch": (dict(torch="2.10.1+cu126"), {}, "torch 2.10.1+cu126 is too old; expected", "install -U"),
    "no compiler": (dict(compilers=()), {}, "no C++ compiler (g++) was found.", "or set CXX"),
    "no such CXX": ({}, dict(CXX="clang++-99"), "no C++ compiler (clang++-99) was found.", "or set CXX"),
    "old g++": (dict(gcc=10), {}, "g++ is g++ 10; expected g++ 11 or later", "set CXX"),
    "not Linux": ({}, dict(STAND_IN_SYSTEM="Windows"), "Windows is not supported; expected Linux.", ""),
    "no GIL": ({}, dict(STAND_IN_GIL_DISABLED="1"), "free-threaded Pythons are not supported", "with a GIL"),
    "read-only": ({}, dict(STAND_IN_READ_ONLY="1"), "cannot be written.", "build a wheel from the sdist"),
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


def test_metadata_need_torch(tmp_path):
    """pip asks for them before it downloads torch."""
    code, text = Sandbox(tmp_path, torch=None).run("dist_info")
    assert code == 1
    assert "torch was not found" in text


@pytest.mark.parametrize(
    ("wish", "why"), [("auto", "no nvcc; to have them, install the CUDA toolkit"), ("0", "FUSEDAMP_CUDA=0")]
)
def test_a_cpu_build_says_that_it_is_one(wish, why, tmp_path):
    sandbox = Sandbox(tmp_path, compilers=("g++",) if wish == "auto" else ("g++", "nvcc"))
    code, text = sandbox.build(FUSEDAMP_CUDA=wish)
    assert code == 0, text
    assert [line for line in text.splitlines() if f"building without CUDA kernels ({why}" in line]
    made = {p.name.partition(".")[0] for p in (tmp_path / "python/fusedamp").glob("*.so")}
    assert made == {"libfusedamp_cpu", "_C"}


def test_the_cuda_object_of_an_earlier_build_is_removed(tmp_path):
    sandbox = Sandbox(tmp_path, compilers=("g++", "nvcc"))
    cuda = tmp_path / "python/fusedamp/libfusedamp_cuda.so"
    assert sandbox.build()[0] == 0
    assert cuda.exists()
    code, text = sandbox.build(FUSEDAMP_CUDA="0")
    assert code == 0, text
    assert f"removed {cuda}" in text
    assert not list(tmp_path.rglob("libfusedamp_cuda.so"))


def test_a_wheel_holds_what_its_build_made(tmp_path):
    """Not what lies in the package's folder, or in the build folder from an earlier wheel."""
    sandbox = Sandbox(tmp_path, compilers=("g++", "nvcc"))
    wheel = ("bdist_wheel", "-d", str(tmp_path / "dist"))
    assert sandbox.build()[0] == 0
    for name in ("libfusedamp_old.so", "_C.cpython-39-x86_64-linux-gnu.so"):
        (tmp_path / "python/fusedamp" / name).touch()
    gone = [tmp_path / "csrc/include/fusedamp" / name for name in ("gone.h", "source/gone.cpp")]
    for path in gone:
        path.touch()
    for cuda in ("1", "0"):
        code, text = sandbox.run(*wheel, FUSEDAMP_CUDA=cuda)
        assert code == 0, text
        (path,) = (tmp_path / "dist").glob("*.whl")
        objects = {name.partition(".")[0] for name in ZipFile(path).namelist() if name.endswith(".so")}
        assert objects == {f"fusedamp/{name}" for name in OBJECT_NAMES[: 2 + int(cuda)]}
        assert sum(name.endswith(".so") for name in ZipFile(path).namelist()) == len(objects)
        api = [p for p in (tmp_path / "csrc/include").rglob("*") if p.is_file()]
        names = {f"fusedamp/{p.relative_to(tmp_path / 'csrc')}" for p in api}
        assert names == {name for name in ZipFile(path).namelist() if "/include/" in name}
        for path in gone:  # of the first wheel
            path.unlink(missing_ok=True)
    assert (tmp_path / "python/fusedamp/libfusedamp_cuda.so").exists(), "a wheel changes no editable install"


def test_flags(tmp_path):
    """One object per instruction set, honest floats everywhere, the stable ABI's target in every op
    object."""
    sandbox = Sandbox(tmp_path)
    assert sandbox.build()[0] == 0
    compiled = [call for call in sandbox.calls() if " -c " in call]
    sonames = re.findall(r"-Wl,-soname=(libfusedamp\S+)", "\n".join(sandbox.calls()))
    assert sonames == ["libfusedamp_cpu.so"]
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
    assert sum(" -Xlinker=-soname=libfusedamp_cuda.so " in call for call in sandbox.calls()) == 1


@pytest.mark.parametrize("name", ["plain", "a b #c"])
def test_compiles_only_what_changed(name, tmp_path):
    (folder := tmp_path / name).mkdir()
    sandbox = Sandbox(folder)
    assert sandbox.build()[0] == 0
    assert sandbox.build()[0] == 0
    assert not [call for call in sandbox.calls() if " -c " in call]
    os.utime(folder / "csrc/ops/rows.cpp", (2**31, 2**31))
    sandbox.build()
    compiled = [call for call in sandbox.calls() if " -c " in call]
    assert len(compiled) == 1
    assert "csrc/ops/rows.cpp" in compiled[0]


def test_isolated_builds_compile_once(tmp_path):
    """Each has pybind11 in another folder. Another version of it compiles the module again."""
    sandbox = Sandbox(tmp_path)
    compiled = []
    for pybind11 in ("/somewhere/a 3.1.0", "/somewhere/b 3.1.0", "/somewhere/b 3.2.0"):
        assert sandbox.build(STAND_IN_PYBIND11=pybind11)[0] == 0
        compiled.append([call for call in sandbox.calls() if " -c " in call and "csrc/python/" in call])
    assert len(compiled[0]) == len(compiled[2]) > 0
    assert compiled[1] == []


def test_a_copied_folder_builds(tmp_path):
    """Copies may follow the build folder's links (shutil.copytree, cp -L)."""
    sandbox = Sandbox(tmp_path)
    assert sandbox.build()[0] == 0
    links = [path for path in sandbox.folder.glob("build/*/pybind11") if path.is_symlink()]
    assert len(links) == 1
    links[0].unlink()
    (links[0] / "pybind11").mkdir(parents=True)
    code, text = sandbox.build()
    assert code == 0, text
    assert links[0].is_symlink()


def test_changed_sources_change_the_origin_of_all_objects(tmp_path):
    sandbox = Sandbox(tmp_path)
    assert sandbox.build()[0] == 0
    before = next(tmp_path.glob("build/*/origin.cpp")).read_text()
    source = tmp_path / "csrc/ops/rows.cpp"
    source.write_text(source.read_text().replace("row", "now", 1))  # the same size
    assert sandbox.build()[0] == 0
    assert next(tmp_path.glob("build/*/origin.cpp")).read_text() != before
    compiled = [call for call in sandbox.calls() if " -c " in call]
    assert sum("/origin.cpp" in call for call in compiled) == 2
    assert len(compiled) == 3


def test_other_libraries_link_again(tmp_path):
    """Objects that were linked for this system do not stay in a build for an older glibc."""
    sandbox = Sandbox(tmp_path, compilers=("g++", "nvcc"))
    for folder in ("", "old", "old"):
        assert sandbox.build(FUSEDAMP_GLIBC=folder)[0] == 0
    assert not sandbox.calls() or all("/dev/null" in call for call in sandbox.calls())
    assert sandbox.build(FUSEDAMP_GLIBC="older")[0] == 0
    linked = [call for call in sandbox.calls() if "-Lolder older/newer_names.o" in call]
    assert [call.partition(" ")[0] for call in linked] == ["g++", "nvcc", "g++"]
    assert not [call for call in sandbox.calls() if " -c " in call]


def test_max_jobs(tmp_path):
    """One compiler at a time, where that is asked for."""
    sandbox = Sandbox(tmp_path)
    sandbox.compiler("g++", before="echo begin >> ${0%/*}/jobs; sleep 0.01; echo end >> ${0%/*}/jobs")
    assert sandbox.build(MAX_JOBS="1")[0] == 0
    jobs = (sandbox.bin / "jobs").read_text().split()
    assert jobs == ["begin", "end"] * (len(jobs) // 2)


def test_a_compiler_error_is_shown(tmp_path):
    sandbox = Sandbox(tmp_path)
    sandbox.compiler("g++", before="echo 'rows.cpp:7: no such thing' >&2; exit 1")
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
    assert re.fullmatch(r"(g|clang)\+\+ \d+\..*", info["compiler"])
    assert re.fullmatch(rf"{re.escape(info['version'])}, sources [0-9a-f]{{12}}", info["origin"])


def test_the_version_for_programs():
    """The headers' numbers, and the one symbol that a library exports."""
    text = (ROOT / "csrc/include/fusedamp/version.h").read_text()
    macros = dict(re.findall(r"#define FUSEDAMP_VERSION(\w*) (\S+)", text))
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)", fusedamp.__version__).groups()
    assert macros == dict(zip(("_MAJOR", "_MINOR", "_PATCH"), numbers, strict=True)) | {
        "": f'"{fusedamp.__version__}"'
    }
    function = ctypes.CDLL(str(PACKAGE / "libfusedamp_cpu.so")).fusedamp_version
    function.restype = ctypes.c_char_p
    assert function().decode() == fusedamp.__version__


@pytest.mark.parametrize("known", [True, False])
def test_objects_of_different_builds_are_refused(known, monkeypatch):
    """The error has both versions and the way out. The objects of this build agree."""
    library._check_origins(library.HAS_CUDA_OPS)
    mine = _C.build_info()
    monkeypatch.setattr(_C, "build_info", lambda: mine | {"origin": "0.0.1, sources abc"})
    if not known:
        monkeypatch.setattr(torch.ops.fusedamp, "_cpu_origin", Mock(side_effect=NotImplementedError))
    other = re.escape(mine["origin"] if known else "unknown (an earlier build)")
    with pytest.raises(ImportError, match=rf"_C\..* is 0.0.1, sources abc, .* is {other}\. .*pip install"):
        library._check_origins(False)


def test_a_cpu_build_warns_where_torch_has_cuda(tmp_path):
    """Once, at import, with the way out."""
    shutil.copytree(PACKAGE, tmp_path / "fusedamp", ignore=shutil.ignore_patterns("*cuda.so"))
    code = (
        "import torch; torch.version.cuda = '13.0'; import fusedamp; import fusedamp.ops; print('imported')"
    )
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.stdout == "imported\n", done.stderr
    assert done.stderr.count("built without CUDA kernels") == 1
    assert "CUDA_HOME" in done.stderr


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
    soname = [] if path.name.startswith("_C") else [path.name]  # which programs record, and not a path
    assert re.findall(r"\(SONAME\).*\[(.*)\]", dynamic) == soname
    for name in ("libc10", "libtorch_python", "libpython", "libcudart"):
        assert name not in dynamic
    paths = rb"/site-packages|/(?:torch|pybind11)/include/"
    paths += b"" if "cuda" in path.name else rb"|/tmp/"  # nvcc names its temporary files in what it links
    assert not re.search(paths, path.read_bytes())


@needs_binutils
@pytest.mark.parametrize("path", OBJECTS, ids=lambda p: p.name)
def test_objects_export_one_symbol_or_none(path):
    """Others could take the place of a program's own, or of another library's."""
    symbols = output_of("nm", "-D", "--defined-only", path).splitlines()
    strong = [line.split()[-1] for line in symbols if line.split()[-2] not in "WVu"]
    wanted = {"_C": ["PyInit__C"], "libfusedamp_cpu": ["fusedamp_version"]}
    assert strong == wanted.get(path.name.partition(".")[0], [])


@needs_binutils
def test_no_instruction_set_leaks_into_shared_functions():
    """Every weak (shared, inline) function that the kernels' objects export could be the AVX-512 one for
    all."""
    symbols = output_of("nm", "-C", "--defined-only", PACKAGE / "libfusedamp_cpu.so")
    weak = [line for line in symbols.splitlines() if " W " in line and "avx" in line]
    assert not weak


def test_import_of_what_is_not_built(tmp_path):
    """As in a checkout whose python/ is on the path, or under another Python than the build's."""
    shutil.copytree(ROOT / "python/fusedamp", tmp_path / "fusedamp", ignore=shutil.ignore_patterns("*.so"))
    done = subprocess.run(
        [sys.executable, "-c", "import fusedamp"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert (
        "ImportError: fusedamp is not built for this Python: its compiled module _C is missing" in done.stderr
    )
