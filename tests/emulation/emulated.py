"""Builds the emulated kernels (the sources that nvcc compiles, with a host compiler) and the emulated
cuBLASLt, in three configurations."""

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


Jobs = dict[str, list[str]]  # object -> the command that compiles it, without output


def compile_all(jobs: Jobs, folder: Path) -> list[Path]:
    """Compile what changed; return the objects."""

    def compile_one(name: str) -> Path:
        target = folder / f"{name}.o"
        make([*jobs[name], "-MD", "-MF", str(beside(target, ".d")), "-c"], target)
        return target

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        return list(pool.map(compile_one, jobs))


def kernel_jobs(kind: Kind, program: str, root: Path) -> Jobs:
    emulation, csrc = root / "tests/emulation", root / "csrc"
    include = [f"-I{emulation}", f"-I{cuda_include()}"]
    emulated = [kind.compiler(), *HOST_FLAGS, *kind.flags, *kind.defines(), *include]
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
    return jobs


LIBRARY_PROGRAMS = ("test_lt", "test_lt_attributes")  # they need no CUDA headers
CUBLASLT = {"13": 131000, "12": 120902}  # soname -> version


def library_jobs(kind: Kind, program: str, root: Path) -> Jobs:
    """What tests the host code of cuBLASLt: ``program``, and the emulated libraries in other objects."""
    compiler = [kind.compiler(), *HOST_FLAGS, *kind.flags]
    sources = [root / f"tests/emulation/{program}.cpp", *root.glob("csrc/engine/cuda/lt_*.cpp")]
    return {source.stem: [*compiler, str(source)] for source in sources}


def make_libraries(kind: Kind, folder: Path, root: Path) -> None:
    """Link the emulated cuBLASLt under two sonames, and a libtorch_cuda.so that needs version 12."""
    shared = [kind.compiler(), *kind.flags, "-shared", "-fPIC"]
    source = str(root / "tests/emulation/cublaslt.cpp")
    for soname, version in CUBLASLT.items():
        target = folder / f"libcublasLt.so.{soname}"
        flags = [*HOST_FLAGS, "-fvisibility=hidden", f"-DEMULATED_VERSION={version}"]
        depends = ["-MD", "-MF", str(beside(target, ".d"))]
        make([*shared, *flags, *depends, f"-Wl,-soname,{target.name}", source], target)
    needs = ["-Wl,--no-as-needed", f"-L{folder}", f"-l:{target.name}", "-Wl,-rpath,$ORIGIN"]
    soname = "-Wl,-soname,libtorch_cuda.so"
    for name, libraries in {"libtorch_cuda.so": needs, "libtorch.so": []}.items():
        make([*shared, soname, "-x", "c", "/dev/null", "-x", "none", *libraries], folder / name, [target])


def build_linear_ops(torch_folder: Path, folder: Path, root: Path = ROOT) -> tuple[Path, Path]:
    """Build the emulated cuBLASLt and linear_ops.cpp, for a process that has this torch; returns both
    libraries."""
    kind, target = KINDS["plain"], folder / "liblinear_ops.so"
    headers = [f"-I{torch_folder}/include", f"-I{torch_folder}/include/torch/csrc/api/include"]
    flags = ["-O1", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020b000000000000", *headers]
    sources = [root / "tests/emulation/linear_ops.cpp", *root.glob("csrc/engine/cuda/lt_*.cpp")]
    jobs = {f"ops_{source.stem}": ["g++", "-std=c++17", *flags, str(source)] for source in sources}
    with locked(folder):
        objects = compile_all(jobs, folder)
        torch_cpu = ["-Wl,--no-as-needed", f"-L{torch_folder}/lib", "-ltorch_cpu"]
        make(["g++", "-shared", *map(str, objects), *torch_cpu], target, objects)
        make_libraries(kind, folder, root)
    return folder / "libcublasLt.so.13", target


def build(kind: Kind, program: str, folder: Path, root: Path = ROOT) -> Path:
    """Builds a test program of the project in `root`, only what changed; returns the binary.

    In a folder that is kept, a second build does nothing. Several processes may call it with one folder.
    """
    assert kind.compiler(), kind.missing
    jobs_of = library_jobs if program in LIBRARY_PROGRAMS else kernel_jobs
    binary = folder / program
    with locked(folder):
        objects = compile_all(jobs_of(kind, program, root), folder)
        link = [kind.compiler(), *kind.flags, "-Wl,-rpath,$ORIGIN"]
        make([*link, *map(str, objects), "-ldl", "-pthread"], binary, objects)
        if program == "test_lt":
            make_libraries(kind, folder, root)
    return binary
