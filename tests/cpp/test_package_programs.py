"""Programs that are built with the CMake package run from their build folder, and have all libraries."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import fusedamp
import pytest
import torch
from cmake_package import CMAKE, CXX, HEADERS, PACKAGE, TORCH, build, configure, fake_torch, install
from fusedamp.ops import library

pytestmark = [
    pytest.mark.skipif(not CMAKE, reason="needs CMake"),
    pytest.mark.skipif(not CXX or not shutil.which("readelf"), reason="needs a C++ compiler and binutils"),
]
FIND = "find_package(fusedamp CONFIG REQUIRED)\n"
PROGRAM = "add_executable(program main.cpp)\ntarget_link_libraries(program PRIVATE fusedamp::fusedamp)\n"
# Ends with 0 if headers and library agree, and with 3 and the message if not.
CHECKS = """#include <fusedamp/version.h>
#include <cstdio>
int main() {
  try {
    fusedamp::check_version();
  } catch (const std::exception& error) {
    return std::puts(error.what()), 3;
  }
}
"""
# Each translation unit trains one weight; those of a program share fusedamp's classes.
TRAINS = """#include <ATen/ATen.h>
#include <fusedamp/fusedamp.h>
double %s() {
  at::Tensor weight = at::ones({3}).set_requires_grad(true);
  fusedamp::optim::SGD optimizer({weight}, fusedamp::optim::SGDOptions(0.5));
  fusedamp::GradScaler scaler(fusedamp::GradScalerOptions().init_scale(4));
  scaler.scale((weight * weight).sum()).backward();
  scaler.clip_grad_norm_(optimizer, 1e9);
  scaler.step(optimizer);
  scaler.update();
  return weight.sum().item<double>() + scaler.get_scale();  // 0 + 4
}
"""
PRINTS = """#include <ATen/core/dispatch/Dispatcher.h>
#include <fusedamp/fusedamp.h>
#include <cstdio>
double one();
double two();
int main() {
  torch::jit::Stack stack;
  c10::Dispatcher::singleton().findSchemaOrThrow("fusedamp::cpu_target", "").callBoxed(stack);
  fusedamp::GradScaler scaler;
  std::printf("%s %s %g %g %g\\n", stack.at(0).toStringRef().c_str(), fusedamp::library_version, one(), two(),
              scaler.get_scale());
}
"""


def run(program: Path) -> subprocess.CompletedProcess[str]:
    variables = {name: value for name, value in os.environ.items() if name != "LD_LIBRARY_PATH"}
    return subprocess.run([str(program)], cwd="/", capture_output=True, text=True, env=variables)


def needed(program: Path) -> list[str]:
    """Return the libraries that the loader loads for a program itself."""
    text = subprocess.run(["readelf", "-d", program], capture_output=True, text=True, check=True).stdout
    return re.findall(r"\(NEEDED\).*\[(.*)\]", text)


def stand_in(path: Path, code: str = "") -> None:
    """Write a library whose content is ``code``."""
    flags = ["-shared", "-fPIC", f"-Wl,-soname={path.name}", "-x", "c", "-"]
    subprocess.run([CXX, *flags, "-o", str(path)], input=code, text=True, check=True)


def configured(folder: Path, text: str, *options: object) -> None:
    done = configure(folder, text, *options)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(("place", "kind"), [("here", "STATIC"), ("elsewhere", "SHARED")])
def test_a_program_uses_the_classes(place, kind, tmp_path):
    """With the installed package or the tree in place, and with a copy in another folder; as a program, as an
    object library and as a library that is static or shared, in two folders; with a linker that drops what it
    can, and with warnings as errors."""
    options = [f"-DCMAKE_PREFIX_PATH={TORCH / 'share/cmake'}", f"-Dfusedamp_DIR={PACKAGE / 'cmake'}"]
    if place == "elsewhere":
        install(site := tmp_path / "a b/site-packages")
        for path in (TORCH, TORCH.parent / "nvidia"):
            if path.exists():
                (site / path.name).symlink_to(path)
        options = [f"-DCMAKE_PREFIX_PATH={site}"]
    (part := tmp_path / "program/part").mkdir(parents=True)
    for name in ("one", "two"):
        (part / f"{name}.cpp").write_text(TRAINS % name)
    (part / "CMakeLists.txt").write_text(
        f"{FIND}add_library(one {kind} one.cpp)\ntarget_link_libraries(one PRIVATE fusedamp::fusedamp)\n"
        "add_library(two OBJECT two.cpp)\ntarget_link_libraries(two PRIVATE fusedamp::fusedamp)\n"
    )
    (part.parent / "main.cpp").write_text(PRINTS)
    text = f"add_subdirectory(part)\n{FIND}{PROGRAM}target_link_libraries(program PRIVATE one two)\n"
    options += [f"-DCMAKE_{what}_LINKER_FLAGS=-Wl,--as-needed" for what in ("EXE", "SHARED")]
    options += ["-DCMAKE_CXX_FLAGS=-Wall -Wextra -Wconversion -Wshadow -Wunused-parameter -Werror"]
    configured(part.parent, text, *options)
    done = run(program := build(part.parent) / "program")
    wanted = f"{library.cpu_target()} {fusedamp.__version__} 4 4 65536\n"
    assert done.stdout == wanted, done.stderr
    assert "libfusedamp_cpu.so" in needed(program), "by name, not by the path that it has here"


@pytest.fixture
def site(tmp_path):
    """fusedamp next to a torch with CUDA, whose libraries have the version only; no classes."""
    package = install(tmp_path / "site")
    for source in package.glob("include/fusedamp/source/*.cpp"):
        source.write_text("")
    folder = fake_torch(tmp_path / "site/torch", cuda=True)
    for path in folder.glob("lib/*.so"):
        stand_in(path)
    text = f'const char* fusedamp_version(void) {{ return "{fusedamp.__version__}"; }}'
    stand_in(package / "libfusedamp_cpu.so", text)
    stand_in(package / "libfusedamp_cuda.so")
    (tmp_path / "program").mkdir()
    (tmp_path / "program/main.cpp").write_text(CHECKS)
    return tmp_path / "site"


@pytest.mark.parametrize("flag", ["--as-needed", "--no-as-needed"])
def test_libraries_without_a_symbol_in_use_stay(flag, site):
    """All that register ops. A library of the program itself stays or goes as the program's flag says."""
    stand_in(site / "libown.so")
    text = f"{FIND}{PROGRAM}target_link_libraries(program PRIVATE {site}/libown.so)\n"
    folder = site.parent / "program"
    configured(folder, text, f"-DCMAKE_PREFIX_PATH={site}", f"-DCMAKE_EXE_LINKER_FLAGS=-Wl,{flag}")
    program = build(folder) / "program"
    ours = [
        "libfusedamp_cpu.so",
        "libfusedamp_cuda.so",
        *(f"libtorch{name}.so" for name in ("", "_cpu", "_cuda")),
    ]
    assert set(ours) <= set(needed(program))
    assert ("libown.so" in needed(program)) == (flag == "--no-as-needed")
    assert run(program).returncode == 0


def test_the_version_header_alone_keeps_the_library(site):
    """For programs that are built without CMake."""
    program, package = site.parent / "program/program", site / "fusedamp"
    for flags in ([], ["-O2", "-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections"]):
        command = [CXX, "-std=c++17", *flags, f"-I{package}/include", site.parent / "program/main.cpp"]
        command += [
            "-Wl,--as-needed",
            f"-L{package}",
            "-lfusedamp_cpu",
            f"-Wl,-rpath,{package}",
            "-o",
            program,
        ]
        (site.parent / "program/main.cpp").write_text("#include <fusedamp/version.h>\nint main() {}\n")
        subprocess.run([*map(str, command), "-o", program], check=True)
        assert "libfusedamp_cpu.so" in needed(program)
        assert run(program).returncode == 0


def test_headers_and_library_of_different_versions(site):
    """The package was updated after the program was built."""
    folder = site.parent / "program"
    configured(folder, FIND + PROGRAM, f"-DCMAKE_PREFIX_PATH={site}")
    program = build(folder) / "program"
    assert run(program).returncode == 0
    stand_in(site / "fusedamp/libfusedamp_cpu.so", 'const char* fusedamp_version(void) { return "99.0.1"; }')
    done = run(program)
    assert done.returncode == 3, "an error, and not the end of the program before main()"
    assert done.stdout == (
        "fusedamp's headers and library are of different versions: this program was built with "
        f"{fusedamp.__version__}, and libfusedamp_cpu.so is 99.0.1. Build the program again with the "
        "installed package, or install that version.\n"
    )


@pytest.mark.skipif(torch.version.cuda is not None, reason="find_package(Torch) needs a CUDA toolkit here")
@pytest.mark.parametrize("order", ["before", "after"])
def test_find_package_torch_in_the_same_program(order, tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    (folder / "main.cpp").write_text(CHECKS)
    finds = ["find_package(Torch REQUIRED)\n", FIND]
    text = "".join(finds if order == "before" else finds[::-1]) + PROGRAM
    options = [f"-DCMAKE_PREFIX_PATH={TORCH / 'share/cmake'}", f"-Dfusedamp_DIR={PACKAGE / 'cmake'}"]
    configured(folder, text + "target_link_libraries(program PRIVATE torch)\n", *options)
    done = run(program := build(folder) / "program")
    assert done.returncode == 0, done.stdout + done.stderr
    assert {"libfusedamp_cpu.so", "libtorch_cpu.so"} <= set(needed(program))


COMPILERS = [name for name in ("g++", "clang++", "clang++-14", "clang++-19") if shutil.which(name)]


@pytest.mark.parametrize("standard", ["c++17", "c++20"])
@pytest.mark.parametrize("compiler", COMPILERS)
def test_the_version_header_compiles_without_a_warning(compiler, standard, tmp_path):
    """Also at the highest optimization the program asks for the library's symbol."""
    flags = [
        f"-std={standard}",
        "-O3",
        "-Wall",
        "-Wextra",
        "-Wpedantic",
        "-Wshadow",
        "-Werror",
        f"-I{HEADERS}",
    ]
    command = [compiler, *flags, "-x", "c++", "-c", "-", "-o", str(tmp_path / "a.o")]
    subprocess.run(command, input="#include <fusedamp/version.h>\n", text=True, check=True)
    symbols = subprocess.run(["nm", "-u", tmp_path / "a.o"], capture_output=True, text=True).stdout
    assert "fusedamp_version" in symbols
