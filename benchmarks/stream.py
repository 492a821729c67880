"""The roofline: the machine's Adam-mix stream (adam_mix.cpp), compiled here, timed with each pair."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("adam_mix.cpp")
BYTES = 4 * 4 + 3 * 4  # per element


class NoStream(Exception):
    """The reason why a run has no roofline."""


class Stream:
    """``stream()`` moves ``self.bytes`` through memory with torch's current number of threads.

    The arrays are torch tensors, so they have the same page size as the optimizers'. Raises NoStream without
    a compiler.
    """

    def __init__(self, numel: int) -> None:
        self._adam_mix = _compiled().adam_mix
        self._arrays = [torch.full((numel,), 1e-3) for _ in range(4)]
        pointers = [ctypes.c_void_p(array.data_ptr()) for array in self._arrays]
        self._where = (*pointers, ctypes.c_size_t(numel))
        self.bytes = BYTES * numel

    def __call__(self) -> None:
        self._adam_mix(*self._where, ctypes.c_int(torch.get_num_threads()))


def _compiled() -> ctypes.CDLL:
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if compiler is None:
        raise NoStream("no C++ compiler found (c++, g++, clang++ or $CXX)")
    with tempfile.TemporaryDirectory(prefix="adam_mix-") as folder:
        library = Path(folder) / "adam_mix.so"
        flags = ["-std=c++17", "-O3", "-march=native", "-shared", "-fPIC", "-pthread"]
        try:
            command = [*compiler.split(), *flags, str(SOURCE), "-o", str(library)]
            subprocess.run(command, check=True, capture_output=True, text=True)
            return ctypes.CDLL(str(library))  # stays mapped after the file is deleted
        except FileNotFoundError as error:
            raise NoStream(f"$CXX is {compiler}, which does not exist") from error
        except subprocess.CalledProcessError as error:
            first = (error.stderr or "no message").strip().split("\n")[0]
            raise NoStream(f"{compiler} could not compile {SOURCE.name}: {first}") from error
