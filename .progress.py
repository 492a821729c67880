"""Runs a Python command and shows how it goes: what it does, for how long, and how many files are compiled.

python .progress.py "fusedamp: compiles" -m pip install -e .

The command's output goes to build/pip.log, and to the screen if the command fails. On a terminal one line
changes each second; elsewhere there is a line every 15 seconds.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

BUILD = Path(__file__).resolve().parent / "build"
WIDTH = 79
DOES = re.compile(r"(Collecting|Downloading|Processing|Building|Installing|Preparing|Getting) ")


def latest(log: Path) -> str:
    """Return what pip says that it does, such as `Downloading torch-2.13.0 (880 MB)`."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").split("\n")
    return next((text for line in reversed(lines) if DOES.match(text := line.strip())), "")


def compiled(since: float) -> str:
    objects = sum(path.stat().st_mtime >= since for path in BUILD.glob("objects-*/*/*.o"))
    return f", {objects} file{'s' * (objects > 1)} compiled" if objects else ""


def run(title: str, command: list[str]) -> int:
    """Run ``command`` under this Python; returns its exit status."""
    started, terminal = time.time(), sys.stdout.isatty()
    BUILD.mkdir(exist_ok=True)
    log = BUILD / "pip.log"
    print(f"{title} (output: {log})", flush=True)
    with log.open("wb") as output:
        child = subprocess.Popen([sys.executable, "-u", *command], stdout=output, stderr=subprocess.STDOUT)
        said = started
        while child.poll() is None:
            time.sleep(0.2)
            now = time.time()
            if now - said >= (1 if terminal else 15):
                said = now
                line = f"{now - started:5.0f} s{compiled(started)}: {latest(log)}"[:WIDTH]
                print(f"\r{line:{WIDTH}}" if terminal else line, end="" if terminal else "\n", flush=True)
    result = f"{time.time() - started:5.0f} s{compiled(started)}: {'FAILED' if child.returncode else 'done'}"
    print(f"\r{result:{WIDTH}}" if terminal else result)
    if child.returncode:
        print(log.read_text(errors="replace"))
    return child.returncode


if __name__ == "__main__":
    try:
        sys.exit(run(sys.argv[1], sys.argv[2:]))
    except KeyboardInterrupt:  # the command got it as well
        sys.exit("\nstopped; the next `make` continues")
