"""The package for C++ programs in both places where it is found, stand-ins for torch, and runs of CMake."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import fusedamp
import torch

PACKAGE = Path(fusedamp.__file__).resolve().parent
INSTALLED = PACKAGE / "include"
HEADERS = INSTALLED if INSTALLED.exists() else PACKAGE.parents[1] / "csrc/include"
TORCH = Path(torch.__file__).resolve().parent
CMAKE = shutil.which("cmake") or shutil.which("cmake", path=str(Path(sys.executable).parent))  # of pip
CXX = shutil.which(os.environ.get("CXX", "g++"))


def install(site: Path) -> Path:
    """Copy what a wheel installs for C++ into the folder ``site``; return the package's folder."""
    shutil.copytree(PACKAGE / "cmake", site / "fusedamp/cmake")
    shutil.copytree(HEADERS, site / "fusedamp/include")
    for library in PACKAGE.glob("libfusedamp_*.so"):
        shutil.copy(library, site / "fusedamp")
    return site / "fusedamp"


def check_out(folder: Path) -> Path:
    """Copy it as it is in a source checkout that was built in place."""
    install(folder / "python")
    (folder / "csrc").mkdir()
    (folder / "python/fusedamp/include").rename(folder / "csrc/include")
    return folder / "python/fusedamp"


def fake_torch(folder: Path, version="2.13.0", standard=201703, cuda=False, config="") -> Path:
    """Write files with the names of torch's; return its folder. Its TorchConfig.cmake stops, as torch's does
    if torch has CUDA and the machine no toolkit, or has the text ``config``."""
    include, cmake, lib = folder / "include", folder / "share/cmake/Torch", folder / "lib"
    folders = ("torch/headeronly", "ATen", "torch/csrc/api/include/torch")
    for path in (*(include / name for name in folders), cmake, lib):
        path.mkdir(parents=True)
    numbers = zip(("MAJOR", "MINOR", "PATCH"), version.split("."), strict=True)
    text = "".join(f"#define TORCH_VERSION_{name} {number}\n" for name, number in numbers)
    (include / "torch/headeronly/version.h").write_text(text)
    (include / "ATen/ATen.h").write_text(
        f"#if !defined(_MSC_VER) && __cplusplus < {standard}L\n#error\n#endif\n"
    )
    for name in ("torch", "torch_cpu", "c10", *(("torch_cuda", "c10_cuda") if cuda else ())):
        (lib / f"lib{name}.so").touch()
    (cmake / "TorchConfig.cmake").write_text(config or 'message(FATAL_ERROR "no CUDA toolkit")\n')
    (cmake / "TorchConfigVersion.cmake").write_text(f'set(PACKAGE_VERSION "{version}")\n')
    return folder


def configure(folder: Path, text: str, *options: object, language="CXX", **variables: str):
    """Run CMake in ``folder`` on a project with the commands ``text``. Nothing but its arguments says where
    packages are."""
    folder.mkdir(exist_ok=True)
    start = f"cmake_minimum_required(VERSION 3.18)\nproject(program LANGUAGES {language})\n"
    (folder / "CMakeLists.txt").write_text(start + text)
    unset = ("CMAKE_", "TORCH_", "Torch_", "LD_LIBRARY_PATH", "LDFLAGS", "CXXFLAGS")
    keep = {name: value for name, value in os.environ.items() if not name.startswith(unset)}
    command = [CMAKE, "-S", folder, "-B", folder / "build", *options]
    command += [f"-DCMAKE_CXX_COMPILER={CXX}", "-DCMAKE_BUILD_TYPE=Debug"]
    return subprocess.run([*map(str, command)], capture_output=True, text=True, env=keep | variables)


def build(folder: Path) -> Path:
    """Build what was configured in ``folder``; return the folder with the programs."""
    done = subprocess.run([CMAKE, "--build", str(folder / "build"), "-v"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "build"
