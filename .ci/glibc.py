"""Makes stand-ins of glibc 2.28 to link with, where the image of manylinux_2_28 cannot run.

glibc keeps every version of a symbol that it ever had. A stand-in is an empty library that offers, of each
symbol of this system's glibc, the newest version up to 2.28 alone: objects linked with it ask for that one.
Names that later moved into libc get their library of 2.28 back. newer_names.cpp defines names that newer
compilers take from a newer libstdc++ and glibc. The build links with all of it: FUSEDAMP_GLIBC=folder.
"""

import os
import re
import subprocess
from pathlib import Path

OLDEST = (2, 28)
HERE = Path(__file__).resolve().parent
# Libraries by the names of linker options, and what each had in 2.28 of what is in libc today. Others, such
# as libutil, are not made: a use of their names shows as a symbol without a version.
LIBRARIES = {
    "c": "libc.so.6",
    "m": "libm.so.6",
    "dl": "libdl.so.2",
    "pthread": "libpthread.so.0",
    "rt": "librt.so.1",
}
LOADER = "ld-linux-x86-64.so.2"
MOVED = {
    "dl": r"dl[a-z]\w*",
    "pthread": r"(_?_?pthread|sem|thrd|mtx|cnd|tss)_\w+|call_once",
    "rt": r"(aio|lio|_?_?mq|shm|timer)_\w+",
    "others": r"(gai|ns_name)_\w+|getaddrinfo_a|(fork|open)pty|log(in|in_tty|out|wtmp)",
}


def run(*command: object, text: str = "") -> str:
    done = subprocess.run([*map(str, command)], input=text, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(map(str, command))} failed:\n{done.stderr}")
    return done.stdout


def symbols_of(library: str, cxx: str) -> dict[str, dict[tuple[int, ...], str]]:
    """Return the versions of each symbol that this system's library offers, with its type in nm's letters."""
    path = run(cxx, f"-print-file-name={library}").strip()
    found: dict[str, dict[tuple[int, ...], str]] = {}
    offered = set()
    for line in run("nm", "-D", "--defined-only", "--with-symbol-versions", path).splitlines():
        if match := re.search(r" (\w) (\w+)(@@?)GLIBC_([\d.]+)$", line):
            found.setdefault(match[2], {})[tuple(map(int, match[4].split(".")))] = match[1]
            offered |= {match[2]} if match[3] == "@@" else set()  # others are for old programs only
    return {name: versions for name, versions in found.items() if name in offered}


def place(name: str, versions: dict[tuple[int, ...], str]) -> str:
    """Return where glibc 2.28 had a symbol that is in libc today. A move added a version."""
    moved = max(versions) > OLDEST
    return next((key for key, names in MOVED.items() if moved and re.fullmatch(names, name)), "c")


def stand_in(folder: Path, library: str, symbols: dict[str, tuple[tuple[int, ...], str]], cxx: str) -> None:
    """Link an empty library with these symbols, each in its version."""
    nodes: dict[str, list[str]] = {}
    code = []
    for name, (version, kind) in sorted(symbols.items()):
        nodes.setdefault("GLIBC_" + ".".join(map(str, version)), []).append(name)
        what = "function" if kind in "TWi" else "object"
        code.append(f'.globl "{name}"\n.type "{name}", @{what}\n.size "{name}", 8\n"{name}": .quad 0')
    versions = folder / "versions.map"
    versions.write_text("".join(f"{node} {{ {'; '.join(names)}; }};\n" for node, names in nodes.items()))
    flags = ["-shared", "-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={versions}"]
    run(cxx, *flags, "-x", "assembler", "-", "-o", folder / library, text=".data\n" + "\n".join(code) + "\n")


def make(folder: Path, cxx: str = os.environ.get("CXX", "g++")) -> Path:
    """Make the stand-ins, and the object of newer_names.cpp, in an empty ``folder``; return it."""
    found = {key: symbols_of(library, cxx) for key, library in LIBRARIES.items()}
    offered: dict[str, dict[str, tuple[tuple[int, ...], str]]] = {key: {} for key in LIBRARIES}
    for key, symbols in found.items():
        for name, versions in symbols.items():
            if old := [version for version in versions if version <= OLDEST]:
                where = place(name, versions) if key == "c" else key
                offered.setdefault(where, {})[name] = (max(old), versions[max(old)])
    for key, library in LIBRARIES.items():
        stand_in(folder, library, offered[key], cxx)
        if key != "c":
            (folder / f"lib{key}.so").symlink_to(library)
    stand_in(folder, LOADER, {"__tls_get_addr": ((2, 3), "T")}, cxx)
    rest = run(cxx, "-print-file-name=libc_nonshared.a").strip()  # atexit, which each library has of its own
    (folder / "libc.so").write_text(f"GROUP ( {folder}/libc.so.6 {rest} AS_NEEDED ( {folder}/{LOADER} ) )\n")
    run(cxx, "-O2", "-fPIC", "-c", HERE / "newer_names.cpp", "-o", folder / "newer_names.o")
    return folder
