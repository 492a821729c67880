"""Runs commands that may crash or hang in their own process group with a time limit."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
TAIL = 4_000  # characters of output that a report keeps
FAREWELL = 10  # seconds between an interrupt and the end


def find_tool(name: str) -> str | None:
    """Find a program of the CUDA toolkit, which may not be on the PATH."""
    homes = filter(None, (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"))
    found = (shutil.which(name, path=f"{home}/bin") for home in homes)
    return shutil.which(name) or next(filter(None, found), None)


@dataclass(frozen=True)
class Finished:
    code: int  # negative: the signal that ended it
    seconds: float
    timed_out: bool
    output: str

    @property
    def tail(self) -> str:
        return self.output[-TAIL:]

    @property
    def verdict(self) -> str:
        """Return why it failed; empty if it did not."""
        if self.timed_out:
            return f"still running after {self.seconds:.0f} s, killed"
        if self.code < 0:
            return f"crashed with {signal.Signals(-self.code).name}"
        return f"exit code {self.code}" if self.code else ""


def execute(
    command: list[str], seconds: float, env: dict[str, str] | None = None, interrupt: bool = False
) -> Finished:
    """Run ``command`` in the source folder. ``interrupt``: at its time limit, it can first print results."""
    begin = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, **(env or {})},
            stdout=output,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
            if interrupt:
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(FAREWELL)
        finally:
            _end(process)
        output.seek(0)
        return Finished(process.returncode, time.monotonic() - begin, timed_out, output.read())


def _end(process: subprocess.Popen) -> None:
    """Kill the process group: workers and profilers have their own processes."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
