"""Where a part runs, and where it puts what it finds."""

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
    """Why a part cannot run here; no failure."""


class Place:
    """Handed to a part. Everything is on disk at once, so a crash loses nothing that was found before.

    Args:
        device: "cuda", or "cpu" in a rehearsal, where the same code runs at tiny sizes.
        seconds: how long the part may take.
        file: where the findings go; None keeps them in memory.
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
        """``tiny`` in a rehearsal."""
        return tiny if self.rehearse else real

    def all_in_time(self, jobs: Iterable[Job], spare: float = 5.0) -> Iterator[Job]:
        """``jobs``, until only ``spare`` seconds are left; it is a failure if some were left out."""
        jobs = list(jobs)
        for done, job in enumerate(jobs):
            if self.seconds_left < spare:
                self.check("finished in time", False, f"{len(jobs) - done} of {len(jobs)} jobs were left out")
                return
            yield job

    def note(self, key: str, value: Any) -> None:
        """A finding: anything that JSON holds."""
        self.findings[key] = value
        self._write()

    def check(self, what: str, holds: bool, detail: str = "") -> None:
        """A finding that can fail the part; the part goes on."""
        self.checks += 1
        if not holds:
            self.failures.append(f"{what}: {detail}" if detail else what)
        self._write()

    @contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """An exception inside is a failure of ``what`` alone."""
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
