"""What is linked with the stand-ins of glibc 2.28 asks for nothing newer, and works."""

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 24), "CXXABI": (1, 3, 11)}  # of manylinux_2_28
pytestmark = [
    pytest.mark.skipif(not (ROOT / ".ci/glibc.py").exists(), reason="not a clone"),
    pytest.mark.skipif(not shutil.which("g++") or not shutil.which("nm"), reason="needs g++ and binutils"),
]


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        import glibc
    finally:
        sys.path.remove(str(ROOT / ".ci"))
    return glibc.make(tmp_path_factory.mktemp("glibc"), "g++")


def link(path, *more):
    flags = ["-std=c++17", "-O0", "-fPIC", "-shared", "-fvisibility=hidden"]
    subprocess.run(["g++", *flags, ROOT / "tests/build/old_glibc.cpp", *more, "-o", path], check=True)
    lines = subprocess.run(["nm", "-D", path], capture_output=True, text=True, check=True).stdout.splitlines()
    return [line.split()[-1] for line in lines if line.split()[-2] == "U"], lines


def newer(symbols):
    """Return the symbols whose version is newer than manylinux_2_28 has, and those without one."""
    found = []
    for symbol in symbols:
        match = re.search(r"@(GLIBC|GLIBCXX|CXXABI)_([\d.]+)$", symbol)
        version = tuple(map(int, match[2].split("."))) if match else ()
        if (match and version > NEWEST[match[1]]) or "@" not in symbol:
            found.append(symbol)
    return found


def test_objects_ask_for_old_symbols_only(stand_ins, tmp_path):
    path = tmp_path / "old.so"
    symbols, lines = link(path, f"-L{stand_ins}", stand_ins / "newer_names.o", "-ldl", "-lpthread")
    assert newer(symbols) == []
    strong = [line.split()[-1] for line in lines if line.split()[-2] not in "UWVwvu"]
    assert strong == ["failures"], "the newer names are hidden"
    failures = ctypes.CDLL(str(path)).failures
    failures.argtypes = [ctypes.c_double, ctypes.c_long]
    assert failures(1.25, -1) == 0


def test_this_system_gives_newer_ones(tmp_path):
    """Or the test above would show nothing."""
    symbols, _ = link(tmp_path / "new.so")
    assert newer(symbols)


@pytest.mark.parametrize(
    ("library", "symbol"),
    [
        ("libc.so.6", "memcpy@@GLIBC_2.14"),
        ("libc.so.6", "pthread_mutex_lock@@GLIBC_2.2.5"),
        ("libm.so.6", "pow@@GLIBC_2.2.5"),
        ("libm.so.6", "expf@@GLIBC_2.27"),
        ("libdl.so.2", "dlsym@@GLIBC_2.2.5"),
        ("libpthread.so.0", "pthread_create@@GLIBC_2.2.5"),
        ("libpthread.so.0", "sem_post@@GLIBC_2.2.5"),
        ("librt.so.1", "shm_open@@GLIBC_2.2.5"),
    ],
)
def test_symbols_are_where_glibc_228_had_them(library, symbol, stand_ins):
    """As nm shows them in that release's libraries."""
    names = subprocess.run(["nm", "-D", stand_ins / library], capture_output=True, text=True).stdout.split()
    assert symbol in names
