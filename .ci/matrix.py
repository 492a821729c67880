"""Tries the wheels in dist/ under other Pythons and torches: `make matrix PYTHON="3.11 3.13" TORCH=2.11.0`.

Each cell is a fresh environment: torch, the wheel as a file, `python -m fusedamp info`, then the quick tests
of the sdist. A cell for which this machine has no Python, or the index no torch, is named as not run. The
cells of all runs are in dist/notes-<version>.md, below the changes; those of other wheels are dropped.
"""

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIST = ROOT / "dist"
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
PYTHONS = ("3.11", "3.12", "3.13", "3.14", "3.15")
TORCHES = ("2.11.0", "2.12.1", "2.13.0", "2.14.1", "2.15.0")
# make hands its own variables down, such as ARGS.
OWN = ("PYTHONPATH", "MAKEFLAGS", "MFLAGS", "MAKELEVEL", "ARGS", "INSTALL", "PYTHON", "TORCH", "VENV")


class Failed(Exception):
    """A command failed; the message has its output."""


def find_python(version: str) -> str | None:
    """Return the interpreter of a version such as 3.12, if it is here and runs."""
    path = shutil.which(f"python{version}")
    runs = path and subprocess.run([path, "--version"], capture_output=True, text=True).stdout
    return path if runs and runs.startswith(f"Python {version}.") else None


def find_wheel(python: str) -> Path | None:
    return next(DIST.glob(f"fusedamp-{VERSION}-cp{python.replace('.', '')}-*.whl"), None)


class Environment:
    """A fresh virtual environment, and what runs in it: outside the clone, and without its variables."""

    def __init__(self, python: str, folder: Path) -> None:
        self.folder, self.python = folder, folder / "bin/python"
        subprocess.run([find_python(python) or python, "-m", "venv", folder], check=True)
        clean = {k: v for k, v in os.environ.items() if k not in OWN and not k.startswith("FUSEDAMP_")}
        self.variables = clean | {"VIRTUAL_ENV": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}

    def run(self, *command: object, cwd: Path | None = None, **variables: str) -> str:
        place = {"cwd": cwd or self.folder, "env": self.variables | variables}
        done = subprocess.run([*map(str, command)], **place, capture_output=True, text=True)
        if done.returncode != 0:
            raise Failed(f"{' '.join(map(str, command))} failed:\n{done.stdout[-6000:]}{done.stderr[-6000:]}")
        return done.stdout

    def install(self, *packages: object, **variables: str) -> None:
        self.run(self.python, "-m", "pip", "install", "-q", *packages, **variables)


def unpack(sdist: Path, folder: Path) -> Path:
    with tarfile.open(sdist) as file:
        file.extractall(folder, filter="data")
    return folder / sdist.name.removesuffix(".tar.gz")


def try_cell(python: str, torch: str, folder: Path) -> str:
    """Return what the tests said; raise `Failed` if anything fails, also if there is no such torch."""
    wheel = find_wheel(python)
    environment = Environment(python, folder / "environment")
    environment.install(f"torch=={torch}")
    environment.install("--only-binary", "fusedamp", wheel)
    print(environment.run(environment.python, "-m", "fusedamp", "info").partition("\n\n")[0], flush=True)
    source = unpack(DIST / f"fusedamp-{VERSION}.tar.gz", folder)
    return environment.run("make", "quick", f"INSTALL={wheel}", cwd=source).splitlines()[-1].strip("= ")


def try_out(python: str, torch: str) -> dict[str, str]:
    """Return the row of one cell."""
    row = {"Python": python, "torch": torch, "system": " ".join(platform.libc_ver()), "wheels": wheels()}
    if find_python(python) is None:
        return row | {"tests": f"not run: no python{python} here"}
    if find_wheel(python) is None:
        return row | {"tests": f"not run: dist/ has no wheel for Python {python}"}
    with tempfile.TemporaryDirectory() as folder:
        try:
            return row | {"tests": try_cell(python, torch, Path(folder))}
        except Failed as error:
            if "No matching distribution found for torch" in str(error):
                return row | {"tests": f"not run: no torch {torch} for Python {python}"}
            print(error)
            return row | {"tests": "FAILED"}


def wheels() -> str:
    """Return a hash of all wheels and the sdist, by which cells of other files are dropped."""
    files = sorted([*DIST.glob(f"fusedamp-{VERSION}-*.whl"), DIST / f"fusedamp-{VERSION}.tar.gz"])
    return hashlib.sha256(b"".join(hashlib.sha256(file.read_bytes()).digest() for file in files)).hexdigest()


def changes(changelog: str) -> tuple[str, str]:
    """Return the heading and the text of the newest section."""
    found = re.search(r"^## (.+?)\n(.*?)(?=^## |\Z)", changelog, re.M | re.S)
    return found[1], found[2].strip()


def table(rows: list[dict[str, str]]) -> str:
    lines = [f"| {row['Python']} | {row['torch']} | {row['system']} | {row['tests']} |" for row in rows]
    return "\n".join(["| Python | torch | C library | quick tests |", "| --- | --- | --- | --- |", *lines])


def record(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Add rows to those of earlier runs with the same files, write the notes, and return all."""
    path = DIST / "matrix.json"
    old = json.loads(path.read_text()) if path.exists() else []

    def key(row):
        return [tuple(map(int, row[k].split("."))) for k in ("Python", "torch")] + [row["system"]]

    known = {str(key(row)): row for row in [*old, *rows] if row["wheels"] == wheels()}
    together = sorted(known.values(), key=key)
    path.write_text(json.dumps(together, indent=1))
    notes = changes((ROOT / "CHANGELOG.md").read_text())[1]
    (DIST / f"notes-{VERSION}.md").write_text(f"{notes}\n\n## Tested\n\n{table(together)}\n")
    return together


def run_cells(pythons: list[str], torches: list[str]) -> list[dict[str, str]]:
    """Run each Python with the newest of the torches, and the oldest Python with each torch."""
    cells = [(pythons[0], torch) for torch in torches] + [(python, torches[-1]) for python in pythons[1:]]
    for python, torch in cells:
        start = time.monotonic()
        row = try_out(python, torch)
        print(
            f"Python {python}, torch {torch}: {row['tests']} ({time.monotonic() - start:.0f} s)", flush=True
        )
        rows = record([row])
    return rows


def unproven(readme: str, rows: list[dict[str, str]]) -> str:
    """Return which versions README names that no cell has passed; "" if none."""
    claim = re.search(r"Python 3\.(\d+) to 3\.(\d+), torch 2\.(\d+) to 2\.(\d+)", " ".join(readme.split()))
    if not claim:
        return 'README has no "Python 3.X to 3.Y, torch 2.X to 2.Y"'
    passed = [row for row in rows if " passed" in row["tests"]]
    ran = {(name, row[name].split(".")[1]) for row in passed for name in ("Python", "torch")}
    first, last, oldest, newest = map(int, claim.groups())
    wanted = [("Python", f"3.{n}") for n in range(first, last + 1)]
    wanted += [("torch", f"2.{n}") for n in range(oldest, newest + 1)]
    return ", ".join(f"{name} {v}" for name, v in wanted if (name, v.split(".")[1]) not in ran)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--python", nargs="+", default=PYTHONS, metavar="3.X")
    parser.add_argument("--torch", nargs="+", default=TORCHES, metavar="2.X.Y")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_arguments(parser)
    options = parser.parse_args()
    if not (DIST / f"fusedamp-{VERSION}.tar.gz").exists():
        sys.exit(f"dist/ has no files of {VERSION}; run `make release` first.")
    rows = run_cells(options.python, options.torch)
    print(table(rows))
    sys.exit(any(row["tests"] == "FAILED" for row in rows))


if __name__ == "__main__":
    main()
