"""Device, time limit and results of a part."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Job = TypeVar("Job")


class Skip(Exception):
    """The reason why a part cannot run here; not a failure."""


class Place:
    """Argument of a part. Results are written to disk immediately, so a crash loses nothing.

    Args:
        device: "cuda", or "cpu" in a rehearsal, where the same code runs at tiny sizes.
        seconds: time limit of the part.
        file: output file of the results; None keeps them in memory.
    """

    def __init__(self, device: str, rehearse: bool, seconds: float, file: Path | None = None) -> None:
        self.device, self.rehearse = device, rehearse
        self._end, self._file = time.monotonic() + seconds, file
        self.findings: dict[str, Any] = {}
        self.failures: list[str] = []
        self.checks = 0

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def sized(self, real: Any, tiny: Any) -> Any:
        """Return ``tiny`` in a rehearsal, else ``real``."""
        return tiny if self.rehearse else real

    def all_in_time(self, jobs: Iterable[Job], spare: float = 5.0) -> Iterator[Job]:
        """Yield ``jobs`` until only ``spare`` seconds are left; omitted jobs are a failure."""
        jobs = list(jobs)
        for done, job in enumerate(jobs):
            if self.seconds_left < spare:
                self.check("finished in time", False, f"{len(jobs) - done} of {len(jobs)} jobs were left out")
                return
            yield job

    def note(self, key: str, value: Any) -> None:
        """Record a result: any JSON value."""
        self.findings[key] = value
        self._write()

    def check(self, what: str, holds: bool, detail: str = "") -> None:
        """Record a check; a failed one fails the part, which continues."""
        self.checks += 1
        if not holds:
            self.failures.append(f"{what}: {detail}" if detail else what)
        self._write()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Record an exception inside as a failure of ``what``, and continue."""
        try:
            yield
        except Skip:
            raise
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            where = f"{Path(place.filename).name}:{place.lineno}"
            self.check(what, False, f"{type(error).__name__} at {where}: {str(error)[:600]}")
        else:
            self.check(what, True)

    def result(self, outcome: str, reason: str = "") -> dict[str, Any]:
        return {
            "outcome": outcome,
            "reason": reason,
            "checks": self.checks,
            "failures": self.failures,
            "findings": self.findings,
        }

    def _write(self) -> None:
        if self._file is not None:
            part = self._file.with_suffix(".part")
            part.write_text(json.dumps(self.result("unfinished")))
            part.replace(self._file)
