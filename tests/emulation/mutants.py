"""Breaks the CUDA kernels and the host code of cuBLASLt in one place at a time and shows that the emulation
notices.

    python tests/emulation/mutants.py [words that the names of the wanted defects contain ...]

The defects are in defects.toml. Exits with 1 if one survives, or if the unbroken code fails.
"""

import itertools
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path

from emulated import KINDS, ROOT, Kind, build

ARGUMENTS = {"test_kernels": ["2", "3000"], "test_lt": ["4"]}  # rounds, largest tensor


@dataclass(frozen=True)
class Defect:
    name: str
    kind: str
    file: str
    good: str
    bad: str

    @property
    def program(self) -> str:
        """Return the test program that includes the file."""
        return "test_lt" if Path(self.file).name.startswith(("lt_", "gemm")) else "test_kernels"


def read_defects() -> list[Defect]:
    rows = tomllib.loads((ROOT / "tests/emulation/defects.toml").read_text())["defect"]
    return [Defect(**row) for row in rows]


KEPT = ("AdamW", "Sgd", "SgdMomentum", "Lion", "Lamb")  # the kernels of other rules show nothing new


def copy_project(root: Path) -> None:
    """Copies what is compiled, without most of the optimizers."""
    for part in ("csrc", "tests/emulation"):
        shutil.copytree(ROOT / part, root / part)
    rules = root / "csrc/math/optimizers.def"
    lines = rules.read_text().splitlines(keepends=True)
    dropped = {
        match[1]
        for line in lines
        if (match := re.match(r"FUSEDAMP_RULE\(\w+, (\w+)\)", line)) and match[1] not in KEPT
    }
    rules.write_text("".join(line for line in lines if not any(f", {rule})" in line for rule in dropped)))
    for source in (root / "csrc/engine/cuda").glob("*.cu"):
        text = source.read_text()
        kept = re.sub(rf"FUSEDAMP_CUDA_STEP\((?:{'|'.join(dropped)})\)\n", "", text)
        source.write_text(kept)


def verdict(kind: Kind, program: str, root: Path) -> str:
    """Empty where all tests pass, else what stopped them."""
    binary = build(kind, program, root / "build" / kind.name, root)
    try:
        done = kind.run([str(binary), *ARGUMENTS[program]], timeout=300)
    except subprocess.TimeoutExpired:
        return "does not end"
    if done.returncode == 0:
        return ""
    patterns = (
        r"==EMULATION== .*|runtime error: .*|ERROR: AddressSanitizer: \S+|data race|FAIL .*|what\(\): .*"
    )
    found = re.search(patterns, done.stdout + done.stderr)
    return found.group() if found else f"exit code {done.returncode}"


def main(words: list[str]) -> int:
    wanted = [d for d in read_defects() if not words or any(word in d.name for word in words)]
    survivors = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        copy_project(root)
        for kind, program in itertools.product(KINDS.values(), ARGUMENTS):
            chosen = (d for d in wanted if (d.kind, d.program) == (kind.name, program))
            defects = sorted(chosen, key=lambda d: d.file)
            if not defects:
                continue
            if kind.compiler() is None:
                print(f"{kind.name}: left out; {kind.missing}")
                continue
            if message := verdict(kind, program, root):
                print(f"unbroken, {program} fails ({kind.name}): {message}")
                return 1
            for defect in defects:
                source = root / "csrc/engine/cuda" / defect.file
                text = source.read_text()
                if text.count(defect.good) != 1:
                    raise ValueError(
                        f"{defect.name}: its place occurs {text.count(defect.good)} times in {defect.file}"
                    )
                source.write_text(text.replace(defect.good, defect.bad))
                message = verdict(kind, program, root)
                source.write_text(text)
                print(
                    f"{'caught' if message else 'SURVIVED':8}  {kind.name:7}  {defect.name}: {message[:110]}",
                    flush=True,
                )
                if not message:
                    survivors.append(defect.name)
    print(f"{len(wanted) - len(survivors)} of {len(wanted)} defects caught")
    return 1 if survivors else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
