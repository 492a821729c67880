"""Builds three shared objects into the package.

    libfusedamp_cpu.so, libfusedamp_cuda.so   the ops, on PyTorch's stable ABI: run under torch 2.11 and later
    _C.<python tag>.so                        build information, tensor access; tied to one Python version

Needs g++ 11 or clang++ 14 or later (CXX) and torch's headers (no GPU; torch itself is never imported). It
downloads nothing. The CUDA object is built if nvcc is found. FUSEDAMP_CUDA=0 omits it, FUSEDAMP_CUDA=1
requires it; TORCH_CUDA_ARCH_LIST selects the architectures, MAX_JOBS the number of compilers at a time.
"""

import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.command.dist_info import dist_info

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)
TORCH_TARGET = (2, 11)  # the oldest torch that the ops load under
CXX_FLAGS = [
    "-O3",
    "-std=c++17",
    "-fPIC",
    "-fvisibility=hidden",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fopenmp-simd",
]
CPU_TARGETS = {  # instruction set -> flags; engine/cpu/kernels.cpp is compiled once for each
    "baseline": [],
    "avx2": ["-mavx2", "-mfma", "-mf16c"],
    "avx512": [f"-m{x}" for x in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq")]
    + ["-mprefer-vector-width=512"],
}
if platform.machine() != "x86_64":
    CPU_TARGETS = {"baseline": []}
CUDA_ARCHS = ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"]


OLDEST_COMPILERS = {"g++": 11, "clang++": 14}


def stop(message: str) -> None:
    sys.exit(f"\nfusedamp: {message}\n")


def check_system() -> None:
    """Stop on systems and Pythons that fusedamp does not support, before anything is built."""
    if platform.system() != "Linux":
        stop(f"{platform.system()} is not supported; expected Linux.")
    if sysconfig.get_config_var("Py_GIL_DISABLED"):
        stop("free-threaded Pythons are not supported; use one with a GIL.")
    if not os.access(ROOT / "python", os.W_OK):
        stop(f"{ROOT} cannot be written. Build elsewhere: copy it, or build a wheel from the sdist.")


def find_torch() -> Path:
    """Find torch's folder: importable, or in the environment of an isolated build."""
    spec = importlib.util.find_spec("torch")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    places += [Path(sysconfig.get_path(kind)) / "torch" for kind in ("platlib", "purelib")]
    torch = next((place.resolve() for place in places if (place / "include").is_dir()), None)
    if torch is None:
        stop(
            "torch was not found; its headers are needed. Install it first: pip install torch (If it is "
            "installed, and your tool hides it from builds: --no-build-isolation.)"
        )
    return torch


def torch_headers(torch: Path) -> tuple[str, list[str]]:
    """Return torch's version and include flags."""
    version = re.search(r"__version__ = '(.+)'", (torch / "version.py").read_text()).group(1)
    if tuple(map(int, version.split(".")[:2])) < TORCH_TARGET:
        stop(f"torch {version} is too old; expected 2.11 or later. Upgrade it: pip install -U torch")
    include = torch / "include"
    return version, [f"-I{include}", f"-I{include / 'torch/csrc/api/include'}"]


def find_nvcc() -> str | None:
    """Find nvcc; None for a CPU-only build, after printing one line on how to get CUDA kernels."""
    wish = os.environ.get("FUSEDAMP_CUDA", "auto")
    if wish not in ("auto", "0", "1"):
        stop(f"FUSEDAMP_CUDA={wish} is unknown; expected auto, 0 or 1.")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    nvcc = next(
        (n for h in homes if h and (n := shutil.which("nvcc", path=f"{h}/bin"))), None
    ) or shutil.which("nvcc")
    if wish == "0" or nvcc is None:
        if wish == "1":
            stop(
                "FUSEDAMP_CUDA=1, but no nvcc was found. Install the CUDA toolkit and set CUDA_HOME (or nvcc "
                "from pip: CONTRIBUTING.md), or drop FUSEDAMP_CUDA."
            )
        why = (
            "FUSEDAMP_CUDA=0"
            if wish == "0"
            else "no nvcc; to have them, install the CUDA toolkit and set CUDA_HOME, or nvcc from pip: "
            "CONTRIBUTING.md"
        )
        print(f"fusedamp: building without CUDA kernels ({why}).", flush=True)
        return None
    return nvcc


def cuda_archs(nvcc: str) -> list[str]:
    """List architectures like '9.0' or '12.0+PTX': as requested, or all of ours that this nvcc supports."""
    asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(" ", ";").strip(";")
    if asked:
        return [arch for arch in asked.split(";") if arch]
    known = subprocess.run(
        [nvcc, "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout.split()
    return [arch for arch in CUDA_ARCHS if "sm_" + arch.split("+")[0].replace(".", "") in known]


def gencode(archs: list[str]) -> list[str]:
    flags = []
    for arch in archs:
        number, ptx = arch.removesuffix("+PTX").replace(".", ""), arch.endswith("+PTX")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if ptx:
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def check_compiler(cxx: str) -> None:
    """Stop if there is no compiler, or if it is too old."""
    expected = "g++ 11 or later, or clang++ 14 or later"
    if not shutil.which(cxx):
        stop(f"no C++ compiler ({cxx}) was found. Install {expected} (Debian: apt install g++), or set CXX.")
    done = subprocess.run([cxx, "-dM", "-E", "-x", "c++", "/dev/null"], capture_output=True, text=True)
    macros = dict(re.findall(r"^#define (\w+) (\d+)$", done.stdout, re.M))
    name, macro = ("clang++", "__clang_major__") if "__clang_major__" in macros else ("g++", "__GNUC__")
    if int(macros.get(macro, 0)) < OLDEST_COMPILERS[name]:
        found = f"is {name} {macros[macro]}" if macro in macros else "is not g++ or clang++"
        stop(f"{cxx} {found}; expected {expected}. Install one, or set CXX.")


def usable_cores() -> int:
    """Count the cores that this process may use: of the machine, and of a container's quota."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
    except (OSError, ValueError):
        return cores
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def old_glibc() -> list[str]:
    """Return what takes the place of this system's glibc, for objects that run on older ones."""
    folder = os.environ.get("FUSEDAMP_GLIBC")
    return [f"-L{folder}", f"{folder}/newer_names.o"] if folder else []


def origin() -> str:
    """Return the version and a hash of csrc/, which all objects of one build share."""
    sources = hashlib.sha256()
    for path in sorted(p for p in (ROOT / "csrc").rglob("*") if p.is_file() and p.suffix != ".md"):
        sources.update(f"{path.relative_to(ROOT)} {path.stat().st_size}\n".encode() + path.read_bytes())
    return f"{VERSION}, sources {sources.hexdigest()[:12]}"


def is_text(path: Path, text: str) -> bool:
    return path.exists() and path.read_text() == text


def files_read(depends: str) -> list[str]:
    """Return the files that a compiler read, from its rule for make, which escapes blanks and signs."""
    names = re.split(r"(?<!\\)\s+", depends.replace("\\\n", " ").partition(": ")[2].strip())
    return [re.sub(r"\\([ #\\])", r"\1", name).replace("$$", "$") for name in names if name]


class Metadata(dist_info):
    """pip asks for metadata first, and then downloads what the package requires, such as torch."""

    def run(self):
        find_torch()
        super().run()


class Files(build_py):
    """Adds the C++ headers, which a wheel has next to its CMake package, and a checkout in csrc/."""

    def run(self):
        package = Path(self.build_lib) / "fusedamp"
        for name in ("cmake", "include"):  # those of an earlier wheel
            shutil.rmtree(package / name, ignore_errors=True)
        super().run()
        if not self.editable_mode:
            shutil.copytree(ROOT / "csrc/include", package / "include", dirs_exist_ok=True)


class Build(build_ext):
    """Compiles in parallel, recompiles only changed sources, and replaces objects atomically."""

    def finalize_options(self):
        super().finalize_options()
        # Editable installs would compile in a temporary folder, and recompile everything each time.
        self.build_temp = str(ROOT / "build" / f"objects-{sysconfig.get_platform()}")

    def run(self):
        import pybind11

        self.torch, self.pybind11 = find_torch(), Path(self.build_temp) / "pybind11"
        self.pybind11_version = pybind11.__version__
        self.pybind11.parent.mkdir(parents=True, exist_ok=True)
        if (
            self.pybind11.is_dir() and not self.pybind11.is_symlink()
        ):  # a copy of the folder followed the link
            shutil.rmtree(self.pybind11)
        self.pybind11.unlink(missing_ok=True)
        self.pybind11.symlink_to(pybind11.get_include())  # in isolated builds another folder each time
        self.torch_version, self.torch_include = torch_headers(self.torch)
        check_compiler(self.cxx)
        self.nvcc = find_nvcc()
        self.archs = cuda_archs(self.nvcc) if self.nvcc else []
        if not self.nvcc:
            left_out = [e for e in self.extensions if "cuda" in e.name]
            self.extensions = [e for e in self.extensions if e not in left_out]
            self.remove(left_out)
        super().run()

    cxx = os.environ.get("CXX", "g++")

    def remove(self, left_out):
        """Remove objects of an earlier build that this one leaves out: they would be packed, or loaded."""
        for name in (e.name for e in left_out):
            places = [Path(self.build_lib) / self.get_ext_filename(name)]
            places += [Path(self.get_ext_fullpath(name))] if self.inplace else []
            for path in filter(Path.exists, places):
                path.unlink()
                print(f"fusedamp: removed {path}, an object of an earlier build with CUDA.", flush=True)

    def get_ext_filename(self, name):
        if name.rpartition(".")[2].startswith("lib"):  # not a Python module: no Python tag
            return name.replace(".", "/") + ".so"
        return super().get_ext_filename(name)

    def build_extension(self, ext):
        jobs = getattr(
            self, "jobs_for_" + ext.name.rpartition(".")[2].removeprefix("libfusedamp").strip("_").lower()
        )()
        with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or usable_cores())) as pool:
            objects = list(pool.map(lambda job: self.compile(ext.name, *job), [*jobs, self.origin_job()]))
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        part, stamp = target.with_suffix(".part"), Path(self.build_temp) / ext.name / "link.cmd"
        link = [self.cxx]
        if "cuda" in ext.name:  # symbols for debuggers name temporary files of nvcc, others in each build
            link = [self.nvcc, "-cudart", "static", "-Xlinker=--strip-all"]
        to_linker = "-Wl," if link[0] == self.cxx else "-Xlinker="
        # Programs record this name instead of a path.
        soname = [] if ext.name.endswith("_C") else [f"{to_linker}-soname={target.name}"]
        libraries = [*self.torch_stubs(to_linker, ext.name), *old_glibc(), "-ldl"]
        command = [*link, "-shared", *soname, *objects, *libraries, "-o", str(part)]
        newest = max(Path(o).stat().st_mtime for o in objects)
        if target.exists() and target.stat().st_mtime > newest and is_text(stamp, "\n".join(command)):
            return
        self.call(command, f"linking {target.name}")
        stamp.write_text("\n".join(command))
        os.replace(part, target)

    def torch_stubs(self, to_linker, name):
        """Build empty stand-ins with the names of torch's libraries: the loader finds the real ones that
        `import torch` loaded, and a CPU-only torch is enough to build for CUDA."""
        if name.endswith("_C"):
            return []
        folder = Path(self.build_temp) / "stubs"
        folder.mkdir(parents=True, exist_ok=True)
        libraries = ["torch_cpu"] + (["torch_cuda"] if "cuda" in name else [])
        for library in libraries:
            soname, stub = f"-Wl,-soname,lib{library}.so", folder / f"lib{library}.so"
            self.call(
                [self.cxx, "-shared", soname, "-x", "c", "/dev/null", "-o", str(stub)], f"linking {stub.name}"
            )
        return [f"{to_linker}--no-as-needed", f"-L{folder}", *(f"-l{library}" for library in libraries)]

    # Each job: source, name of its object, command without input and output.
    def origin_job(self):
        source = Path(self.build_temp) / "origin.cpp"
        text = f'namespace fusedamp {{\nconst char* origin() {{ return "{origin()}"; }}\n}}\n'
        if not is_text(source, text):
            source.parent.mkdir(parents=True, exist_ok=True)
            source.write_text(text)
        return source, "origin", [self.cxx, *CXX_FLAGS]

    def jobs_for_cpu(self):
        for source in sorted(ROOT.glob("csrc/engine/cpu/*.cpp")):
            targets = CPU_TARGETS if source.stem == "kernels" else {"": []}
            for target, flags in targets.items():
                define = [f"-DFUSEDAMP_TARGET={target}"] if target else []
                yield source, f"{source.stem}_{target}", [self.cxx, *CXX_FLAGS, *flags, *define]
        for name in ("rows", "packed", "library", "cpu", "cpu_linear", "version"):
            yield ROOT / f"csrc/ops/{name}.cpp", name, [self.cxx, *CXX_FLAGS, *self.torch_flags()]

    def jobs_for_cuda(self):
        host = [
            f for flag in CXX_FLAGS if flag != "-std=c++17" and flag != "-O3" for f in ("-Xcompiler", flag)
        ]
        nvcc = [self.nvcc, "-O3", "-std=c++17", "--fmad=false", "--expt-relaxed-constexpr", *host]
        for source in sorted(ROOT.glob("csrc/engine/cuda/*.cu")):
            yield source, source.stem, [*nvcc, *gencode(self.archs)]
        for source in sorted(ROOT.glob("csrc/engine/cuda/lt_*.cpp")):  # no CUDA headers
            yield source, source.stem, [self.cxx, *CXX_FLAGS]
        for source in (
            ROOT / "csrc/ops/rows.cpp",
            ROOT / "csrc/ops/packed.cpp",
            *sorted(ROOT.glob("csrc/ops/cuda*.cpp")),
        ):
            yield source, source.stem, [*nvcc, "-x", "c++", "-DUSE_CUDA", *self.torch_flags()]

    def jobs_for_c(self):
        def text(value):
            return '"' + value.replace('"', "'") + '"'

        release = (
            subprocess.run([self.nvcc, "--version"], capture_output=True, text=True).stdout
            if self.nvcc
            else ""
        )
        defines = {
            "VERSION": text(VERSION),
            "TORCH": text(self.torch_version),
            "TORCH_TARGET": text(".".join(map(str, TORCH_TARGET))),
            "NVCC": text(match.group(1) if (match := re.search(r"release ([\d.]+)", release)) else ""),
            "CUDA_ARCHS": ", ".join(map(text, self.archs)),
            "CPU_TARGETS": ", ".join(map(text, CPU_TARGETS)),
        }
        include = [f"-I{self.pybind11}", f"-I{sysconfig.get_path('include')}"]
        flags = [f"-DFUSEDAMP_{name}={value}" for name, value in defines.items()]
        for source in sorted(ROOT.glob("csrc/python/*.cpp")):
            yield source, source.stem, [self.cxx, *CXX_FLAGS, *include, *self.torch_include, *flags]

    def torch_flags(self):
        major, minor = TORCH_TARGET
        return [f"-DTORCH_TARGET_VERSION=0x{major:02x}{minor:02x}000000000000", *self.torch_include]

    def compile(self, library, source, name, command):
        """Compile if the command, the source or a header that it read changed; returns the object's path."""
        target = Path(self.build_temp) / library / f"{name}.o"
        target.parent.mkdir(parents=True, exist_ok=True)
        depends, stamp = target.with_suffix(".d"), target.with_suffix(".cmd")
        recipe = "\n".join([*command, f"pybind11 {self.pybind11_version}"])
        if target.exists() and is_text(stamp, recipe) and depends.exists():
            names = files_read(depends.read_text())
            read = [Path(name) for name in names if not name.startswith(f"{self.pybind11}/")]
            if all(f.exists() and f.stat().st_mtime <= target.stat().st_mtime for f in read):
                return str(target)
        names = {ROOT: ".", self.torch: "torch", self.pybind11: "pybind11"}  # the same bytes in any folder
        paths = [f"-ffile-prefix-map={path}={name}" for path, name in names.items()]
        if command[0] == self.nvcc:
            paths = [text for path in paths for text in ("-Xcompiler", path)]
        self.call(
            [*command, *paths, "-MD", "-MF", str(depends), "-c", str(source), "-o", str(target)],
            str(source.relative_to(ROOT)),
        )
        stamp.write_text(recipe)
        return str(target)

    def call(self, command, what):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            stop(f"{what} failed:\n  {' '.join(command)}\n{done.stdout}{done.stderr}")


check_system()
setup(
    ext_modules=[Extension(f"fusedamp.{name}", []) for name in ("libfusedamp_cpu", "libfusedamp_cuda", "_C")],
    cmdclass={"build_ext": Build, "build_py": Files, "dist_info": Metadata},
)
