"""The program of the C++ tests: built once per run of the tests, and asked over its standard input."""

import fcntl
import os
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from cmake_package import CXX, HEADERS, PACKAGE, TORCH

SOURCES = Path(__file__).resolve().parents[1] / "cpp/program"
CLASSES = sorted(str(path.relative_to(HEADERS)) for path in HEADERS.rglob("*.cpp"))
INCLUDE = TORCH / "include"
LIB = TORCH / "lib"
# Torch's headers say which standard they need.
STANDARD = max(
    [
        17,
        *(
            int(s[2:4])
            for s in re.findall(r"__cplusplus < (20\d\d)\d\dL", (INCLUDE / "ATen/ATen.h").read_text())
        ),
    ]
)
FLAGS = [
    *("-O0", "-Wall", "-Wextra", "-Werror", f"-I{HEADERS}"),
    *("-isystem", str(INCLUDE), "-isystem", str(INCLUDE / "torch/csrc/api/include")),
]


def compile_(*arguments: object, standard: int = STANDARD, compiler: str | None = CXX) -> str:
    """Run the compiler; return its complaints."""
    command = [compiler, f"-std=c++{standard}", *FLAGS, *arguments]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    return done.stderr if done.returncode else ""


def _build(folder: Path) -> None:
    classes = folder / "classes.cpp"  # all in one, as the CMake package compiles them
    classes.write_text("".join(f"#include <{name}>\n" for name in CLASSES))
    sources = [classes, *sorted(SOURCES.glob("*.cpp"))]
    objects = [folder / f"{source.stem}.o" for source in sources]
    with ThreadPoolExecutor() as pool:
        complaints = pool.map(lambda s, o: compile_("-c", s, "-o", o), sources, objects)
    assert not any(complaints := list(complaints)), "".join(complaints)[:6000]
    places = [f"-L{LIB}", f"-Wl,-rpath,{LIB}", f"-L{PACKAGE}", f"-Wl,-rpath,{PACKAGE}"]
    libraries = [f"-l{name}" for name in ("fusedamp_cpu", "torch", "torch_cpu", "c10")]
    complaint = compile_(*objects, "-o", folder / "part", *places, *libraries)
    assert not complaint, complaint
    (folder / "part").rename(folder / "program")


def built(folder: Path) -> Path:
    """Return the program in ``folder``, built if need be; other processes wait."""
    folder.mkdir(exist_ok=True)
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "program").exists():
            _build(folder)
    return folder / "program"


class Program:
    """The running program. A case that crashes it fails, and the next one starts it again."""

    def __init__(self, path: Path, folder: Path) -> None:
        self._path, self._folder = path, folder
        self._process: subprocess.Popen[str] | None = None

    def run(self, commands: list) -> list:
        """Return what the program saw when it carried out ``commands``."""
        given, seen = self._folder / "given.pt", self._folder / "seen.pt"
        torch.save(commands, given)
        seen.unlink(missing_ok=True)
        if self._process is None:
            pipe = subprocess.PIPE
            environment = {k: v for k, v in os.environ.items() if k != "LD_LIBRARY_PATH"}
            self._process = subprocess.Popen(
                [str(self._path)], stdin=pipe, stdout=pipe, text=True, env=environment
            )
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{given}\n{seen}\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if answer != "done\n":
            process, self._process = self._process, None
            raise AssertionError(f"the program ended with {process.wait()}: {answer}")
        return torch.load(seen, weights_only=True)

    def close(self) -> None:
        if self._process is not None:
            self._process.communicate()
            self._process = None
