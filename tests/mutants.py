"""Breaks the code one line at a time, and runs the tests that should fail: `make mutants`.

mutants.toml lists the mutants: a file, a piece of its text that occurs once, what to put in its place, and
the tests to run. Each is applied to a copy of the source tree, which is built (only what changed) and tested
with `pytest -x`. A mutant that no test notices has survived; so has a test suite with a hole, and the exit
code is 1.

    python tests/mutants.py [-j JOBS] [words of a mutant's name ...]
"""

import argparse
import os
import queue
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = (
    ".ci",
    "benchmarks",
    "csrc",
    "docs",
    "python",
    "tests",
    "setup.py",
    "pyproject.toml",
    "CHANGELOG.md",
    "README.md",
    "LICENSE",
)
OK = ("killed", "killed (too slow)", "killed (crash)")


@dataclass(frozen=True)
class Mutant:
    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def texts(self, root: Path) -> tuple[str, str]:
        """The file as it is, and broken."""
        text = (root / self.file).read_text()
        if text.count(self.old) != 1:
            raise ValueError(f"{self.file} has {text.count(self.old)} of {self.old!r}; expected 1")
        return text, text.replace(self.old, self.new)


class Workshop:
    """A copy of the source tree that can be broken, built and tested."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.is_built_broken = False  # the sources are intact again, what was built of them is not
        # In front of an installed fusedamp, whatever way that was installed.
        path = [str(folder / "python"), os.environ.get("PYTHONPATH", "")]
        self.environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(filter(None, path)),
            "PYTHONDONTWRITEBYTECODE": "1",
            "FUSEDAMP_CUDA": "0",
            "FUSEDAMP_CPU_TARGET": "baseline",  # every processor has it, and it compiles fastest
            "OMP_NUM_THREADS": "2",
        }

    @classmethod
    def of_the_checkout(cls, folder: Path) -> "Workshop":
        for name in COPIED:
            source = ROOT / name
            if source.is_dir():
                shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
            elif source.exists():
                shutil.copy2(source, folder / name)
        setup = folder / "setup.py"  # vectorizing takes most of the compiler's time and changes no result
        setup.write_text(setup.read_text().replace('"-O3"', '"-O1"'))
        return cls(folder)

    def twin(self, folder: Path) -> "Workshop":
        """Another one, with all that was built here."""
        shutil.copytree(self.folder, folder)
        for depends in folder.glob("build/**/*.d"):  # they name the sources by absolute paths
            depends.write_text(depends.read_text().replace(str(self.folder), str(folder)))
        return Workshop(folder)

    def run(self, *command: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def build(self) -> str:
        """Nothing, or what went wrong. The loops for instruction sets that are not run stay as they are."""
        done = self.run("setup.py", "-q", "build_ext", "--inplace")
        for target in ("avx2", "avx512"):
            for compiled in self.folder.glob(f"build/**/kernels_{target}.o"):
                os.utime(compiled, (time.time() + 1e6,) * 2)
        return "" if done.returncode == 0 else done.stdout + done.stderr

    def test(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        return self.run("-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *arguments, timeout=timeout)

    def try_out(self, mutant: Mutant) -> tuple[str, str]:
        """Result for a mutant, and the test that failed or the problem."""
        path, compiled = self.folder / mutant.file, mutant.file.startswith("csrc/")
        try:
            intact, broken = mutant.texts(self.folder)
        except ValueError as error:
            return "stale", str(error)
        path.write_text(broken)
        must_build = self.is_built_broken = compiled or self.is_built_broken
        try:
            if must_build and (complaint := self.build()):
                return "does not build", complaint[-2000:]
            self.is_built_broken = compiled
            done = self.test(*mutant.tests, timeout=300)
        except subprocess.TimeoutExpired:
            return "killed (too slow)", ""
        finally:
            path.write_text(intact)  # a new time of change: the next build compiles it again
        failed = [
            line.split(" - ")[0] for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))
        ]
        if done.returncode < 0:  # by a signal: a stale address, say
            return "killed (crash)", ""
        if done.returncode == 1:
            return "killed", failed[0].partition(" ")[2] if failed else ""
        return ("survived", "") if done.returncode == 0 else ("no test ran", done.stdout[-2000:])


def read_mutants() -> list[Mutant]:
    rows = tomllib.loads((ROOT / "tests" / "mutants.toml").read_text())["mutant"]
    return [Mutant(**(row | {"tests": tuple(row["tests"])})) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("-j", "--jobs", type=int, default=min(4, len(os.sched_getaffinity(0))))
    parser.add_argument("words", nargs="*", help="only mutants whose name or file has one of these")
    options = parser.parse_args()
    mutants = [
        m for m in read_mutants() if not options.words or any(w in m.name + m.file for w in options.words)
    ]
    if not mutants:
        parser.error(f"no mutant has any of {options.words} in its name or file")
    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        first = Workshop.of_the_checkout(Path(folder) / "0")
        if complaint := first.build():
            sys.exit(f"The intact copy does not build:\n{complaint}")
        parallel = ("-n", str(options.jobs)) if find_spec("xdist") else ()
        tests = dict.fromkeys(test for m in mutants for test in m.tests if not test.startswith("-"))
        intact = first.test(*parallel, *tests)
        if intact.returncode != 0:
            sys.exit(f"The tests fail without any mutant:\n{intact.stdout[-4000:]}")
        print(
            f"{time.monotonic() - start:5.0f} s  built and tested intact; {len(mutants)} mutants", flush=True
        )
        workshops: queue.Queue[Workshop] = queue.Queue()
        workshops.put(first)
        for job in range(1, min(options.jobs, len(mutants))):
            workshops.put(first.twin(Path(folder) / str(job)))

        def try_out(mutant: Mutant) -> tuple[str, str]:
            workshop = workshops.get()
            try:
                result = workshop.try_out(mutant)
            finally:
                workshops.put(workshop)
            print(
                f"{time.monotonic() - start:5.0f} s  {result[0]:18} {mutant.name:58} {result[1]}", flush=True
            )
            return result

        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(try_out, mutants))
    bad = [(m, *result) for m, result in zip(mutants, results, strict=True) if result[0] not in OK]
    print(f"{len(mutants) - len(bad)} of {len(mutants)} killed in {time.monotonic() - start:.0f} s")
    for mutant, verdict, detail in bad:
        print(
            f"\n{verdict}: {mutant.name} ({mutant.file})\n  - {mutant.old!r}\n  + {mutant.new!r}\n  {detail}"
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
