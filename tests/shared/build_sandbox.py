"""A copy of the sources to run setup.py in, with stand-ins for compilers and torch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# Writes what a compiler would: the object, and the list of files that it read.
COMPILER = r"""#!/bin/sh
case "$*" in
  *-dM*) echo "#define __GNUC__ 12"; exit ;;
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
[ -z "$depends" ] || echo "object: $(echo "$source" | sed 's/[ #]/\\\\&/g')" > "$depends"
"""
# setup.py sees no nvcc, compiler or torch but those of the test, wherever else this machine has them.
DRIVER = """
import importlib.util, os, platform, runpy, shutil, sys, sysconfig
which, find_spec, get_path, here = shutil.which, importlib.util.find_spec, sysconfig.get_path, os.getcwd()

def which_here(name, mode=1, path=None):
    found = which(name, mode, path)
    return found if found and found.startswith(here) else None

def path_here(kind, *args, **kwargs):
    return f"{here}/site" if kind in ("platlib", "purelib") else get_path(kind, *args, **kwargs)

shutil.which, sysconfig.get_path = which_here, path_here
importlib.util.find_spec = lambda name, *more: None if name == "torch" else find_spec(name, *more)
platform.system = lambda: os.environ.get("STAND_IN_SYSTEM", "Linux")
if "STAND_IN_READ_ONLY" in os.environ:
    os.access = lambda *args: False
if "STAND_IN_GIL_DISABLED" in os.environ:
    sysconfig.get_config_vars()["Py_GIL_DISABLED"] = 1
if "STAND_IN_PYBIND11" in os.environ:
    import pybind11
    folder, pybind11.__version__ = os.environ["STAND_IN_PYBIND11"].split()
    pybind11.get_include = lambda: folder
sys.argv[0] = "setup.py"
runpy.run_path("setup.py", run_name="__main__")
"""


class Sandbox:
    """A copy of the sources with a stand-in torch and stand-in compilers."""

    def __init__(self, folder, torch="2.13.0", compilers=("g++",), gcc=12):
        self.folder, self.bin = folder, folder / "bin"
        shutil.copytree(ROOT / "csrc", folder / "csrc")
        for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
            if (ROOT / name).exists():
                shutil.copy(ROOT / name, folder)
        (folder / "python/fusedamp").mkdir(parents=True)
        (folder / "python/fusedamp/__init__.py").touch()
        self.bin.mkdir()
        for name in compilers:
            self.compiler(name, gcc=gcc)
        if torch:
            (folder / "site/torch/include").mkdir(parents=True)
            (folder / "site/torch/version.py").write_text(f"__version__ = '{torch}'\n")

    def compiler(self, name, before="", gcc=12):
        """Write a stand-in compiler that runs the shell command ``before`` each time it compiles or links."""
        text = COMPILER.replace("__GNUC__ 12", f"__GNUC__ {gcc}").replace("\necho", f"\n{before}\necho", 1)
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def build(self, **variables):
        """Build in place; return the exit code and the output."""
        return self.run("build_ext", "--inplace", **variables)

    def run(self, *arguments, **variables):
        """Run setup.py; return the exit code and the output."""
        keep = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("FUSEDAMP_", "CUDA", "TORCH_", "CXX", "MAX_JOBS"))
        }
        environment = keep | {"PATH": f"{self.bin}:{os.environ['PATH']}"} | variables
        (self.bin / "calls").write_text("")
        done = subprocess.run(
            [sys.executable, "-c", DRIVER, *arguments],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def calls(self):
        return (self.bin / "calls").read_text().splitlines()
