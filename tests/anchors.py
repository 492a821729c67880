"""Checks that each mutant and each defect still applies: `make check`.

The text to replace must occur exactly once in its file, and the tests that should fail must exist. Otherwise
a change elsewhere would disable the mutant silently.
"""

import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def lost() -> list[str]:
    """Return the problems, one line each."""
    mutants = tomllib.loads((ROOT / "tests/mutants.toml").read_text())["mutant"]
    defects = tomllib.loads((ROOT / "tests/emulation/defects.toml").read_text())["defect"]
    rows = [(row["name"], row["file"], row["old"]) for row in mutants]
    rows += [(row["name"], f"csrc/engine/cuda/{row['file']}", row["good"]) for row in defects]
    found = []
    for name, file, text in rows:
        path = ROOT / file
        count = path.read_text().count(text) if path.exists() else 0
        if count != 1:
            found.append(f"{name}: {file} has {count} of {text!r}; expected 1")
    for row in mutants:
        for test in row["tests"]:
            if not test.startswith("-") and test.endswith(".py") and not (ROOT / test).exists():
                found.append(f"{row['name']}: {test} does not exist")
    names = [name for name, _, _ in rows]
    return found + [f"{name}: the name occurs twice" for name in sorted(set(names)) if names.count(name) > 1]


if __name__ == "__main__":
    complaints = lost()
    print("\n".join(complaints), end="\n" if complaints else "")
    sys.exit(bool(complaints))
