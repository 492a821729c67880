"""Builds the emulated kernels: the sources that nvcc compiles, with a host compiler, in three
configurations."""

import fcntl
import functools
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HOST_FLAGS = [
    "-std=c++17",
    "-g",
    "-Wall",
    "-Wextra",
    "-Wno-unknown-pragmas",
    "-fno-strict-aliasing",
    "-ffp-contract=off",
]


@dataclass(frozen=True)
class Kind:
    """A compiler and its flags; the kernels' geometry: threads, elements of a chunk, words of a packet."""

    name: str
    compilers: tuple[str, ...]  # the first one that is there
    flags: tuple[str, ...]
    geometry: tuple[int, int, int]
    missing: str
    environment: tuple[tuple[str, str], ...] = ()

    def compiler(self) -> str | None:
        return next(filter(None, map(shutil.which, self.compilers)), None)

    def defines(self) -> list[str]:
        names = ("EMULATED_BLOCK", "EMULATED_CHUNK", "EMULATED_PACKET_WORDS")
        return [f"-D{name}={value}" for name, value in zip(names, self.geometry, strict=True)]

    def run(self, command: list[str], timeout: float = 500) -> subprocess.CompletedProcess:
        return subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout,
            env={**os.environ, **dict(self.environment)},
        )


ADDRESS = (
    "-O1",
    "-fno-omit-frame-pointer",
    "-fsanitize=address,undefined,float-cast-overflow",
    "-fno-sanitize-recover=all",
)
THREAD = ("-O1", "-fno-omit-frame-pointer", "-fsanitize=thread")
GXX = "needs g++"
CLANG = (
    "ThreadSanitizer with fibers needs clang 17 or later (Debian: apt install clang-19 libclang-rt-19-dev)"
)
KINDS = {
    kind.name: kind
    for kind in (
        Kind("plain", ("g++",), ("-O2",), (256, 16384, 4000), GXX),  # the geometry of a GPU
        Kind("address", ("g++",), ADDRESS, (96, 1024, 160), GXX),  # odd numbers, many chunks and packets
        Kind(
            "thread",
            ("clang++-19", "clang++-20", "clang++-18", "clang++-17"),
            THREAD,
            (64, 1024, 160),
            CLANG,
            (("TSAN_OPTIONS", "halt_on_error=1"),),
        ),
    )
}


def cuda_include() -> Path | None:
    """Find CUDA's headers: next to nvcc, or in NVIDIA's Python wheels."""
    nvcc = shutil.which("nvcc")
    homes = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and str(Path(nvcc).resolve().parents[1]),
    ]
    places = [Path(home) / "include" for home in (*homes, "/usr/local/cuda") if home]
    return next((place for place in places if (place / "cuda_fp16.h").exists()), None)


def call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def beside(target: Path, ending: str) -> Path:
    return target.with_name(target.name + ending)


def is_fresh(target: Path, recipe: str) -> bool:
    """Was the file made by this recipe, after every file that it was made from (headers included) had changed
    last?"""
    depends, stamp = beside(target, ".d"), beside(target, ".recipe")
    if not (target.exists() and depends.exists() and stamp.exists()) or stamp.read_text() != recipe:
        return False
    sources = depends.read_text().replace("\\\n", " ").partition(":")[2].split()
    return all(Path(s).exists() and Path(s).stat().st_mtime < target.stat().st_mtime for s in sources)


def make(command: list[str], target: Path, made_from: Iterable[Path] = ()) -> None:
    """Run a compiler unless the target is up to date; ``made_from``: its inputs if it reports none."""
    recipe = " ".join([version(command[0]), *command])
    if is_fresh(target, recipe):
        return
    part, stamp = beside(target, ".part"), beside(target, ".recipe")
    stamp.unlink(missing_ok=True)
    call([*command, "-o", str(part)])
    if made_from:
        beside(target, ".d").write_text(f"{target}: {' '.join(map(str, made_from))}\n")
    os.replace(part, target)
    stamp.write_text(recipe)


@functools.cache
def version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.partition("\n")[0]


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """One process at a time: tests run in several."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def kernel_names(mangled: Iterable[str]) -> set[str]:
    """Kernels with their template arguments, of symbols that nvcc or a host compiler made."""
    text = subprocess.run(
        ["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True
    ).stdout
    return set(re.findall(r"(\w+_kernel(?:<.*>)?)\(", text))


def kernels_of(library: Path, kind: Kind) -> set[str]:
    """Return the kernels that a CUDA object registers, with the packet size of ``kind``."""
    found = re.findall(rb"\0(_ZN8fusedamp4cuda\w*_kernel\w*)(?=\0)", library.read_bytes())
    names = kernel_names(name.decode() for name in found)
    words, small = kind.geometry[2], kind.geometry[2] * 12 // 100
    sizes = {"<4000>": f"<{words}>", "<480>": f"<{small}>"}
    return {re.sub("|".join(sizes), lambda size: sizes[size.group()], name) for name in names}


def kernels_run(binary: Path, output: str) -> set[str]:
    """Return the kernels that test_kernels reports as launched."""
    table = subprocess.run(["nm", str(binary)], capture_output=True, text=True, check=True).stdout
    names: dict[int, list[str]] = {}
    for address, name in re.findall(r"^([0-9a-f]+) \w (\w+)$", table, re.M):
        names.setdefault(int(address, 16), []).append(name)
    (main,) = (address for address, known in names.items() if "main" in known)
    ran = [names[main + int(distance)] for distance in re.findall(r"^ran (-?\d+)$", output, re.M)]
    return kernel_names(name for known in ran for name in known)


def build(kind: Kind, program: str, folder: Path, root: Path = ROOT) -> Path:
    """Builds test_kernels or test_runtime of the project in `root`, only what changed; returns the binary.

    In a folder that is kept, a second build does nothing. Several processes may call it with one folder.
    """
    compiler, emulation, csrc = kind.compiler(), root / "tests/emulation", root / "csrc"
    assert compiler, kind.missing
    include = [f"-I{emulation}", f"-I{cuda_include()}"]
    emulated = [compiler, *HOST_FLAGS, *kind.flags, *kind.defines(), *include]
    # The fibers, and the CPU engine as the reference, stay free of sanitizers.
    jobs = {
        part: ["g++", *HOST_FLAGS, "-O2", *include, str(emulation / f"{part}.cpp")]
        for part in ("runtime", "meeting")
    }
    jobs[program] = [*emulated, str(emulation / f"{program}.cpp")]
    if program == "test_kernels":
        reference = ["g++", *HOST_FLAGS, "-O2"]
        jobs["cpu_engine"] = [*reference, str(csrc / "engine/cpu/engine.cpp")]
        jobs["cpu_kernels"] = [*reference, "-DFUSEDAMP_TARGET=baseline", str(csrc / "engine/cpu/kernels.cpp")]
        for source in csrc.glob("engine/cuda/*.cu"):
            jobs[source.stem] = [*emulated, "-x", "c++", str(source)]
    objects = {name: folder / f"{name}.o" for name in jobs}

    def compile_one(name: str) -> None:
        depends = ["-MD", "-MF", str(beside(objects[name], ".d"))]
        make([*jobs[name], *depends, "-c"], objects[name])

    binary = folder / program
    with locked(folder):
        with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            list(pool.map(compile_one, jobs))
        make([compiler, *kind.flags, *map(str, objects.values())], binary, objects.values())
    return binary
