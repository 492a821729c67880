"""pytest with ``FUSEDAMP_TEST_DEVICE``: every test that does not name a device runs on the GPU."""

from __future__ import annotations

import importlib.util
import os
import sys
import tempfile
import xml.etree.ElementTree as xml
from pathlib import Path

from ..borrowed import on_device
from ..place import Place, Skip
from ..process import execute

SHOWN = 60  # failing tests that are listed
TINY = ["tests/test_ops_scale.py", "-k", "hysteresis"]


def run(place: Place) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    # Modules about the host's side test nothing of the device, and take most of the time.
    left_out = [f"--ignore=tests/{module}.py" for module in on_device.HOST_ONLY.split()]
    whole = ["tests", "--ignore=tests/emulation", *left_out, "--continue-on-collection-errors"]
    command += place.sized(whole, TINY)
    if importlib.util.find_spec("xdist") is not None and not place.rehearse:
        command += ["-n", str(max(1, min(14, (os.cpu_count() or 1) * 3 // 4)))]
    if importlib.util.find_spec("pytest_timeout") is not None:
        command += ["--timeout=60"]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "junit.xml"
        done = execute(
            [*command, f"--junitxml={file}"],
            place.seconds_left - 15,
            {"FUSEDAMP_TEST_DEVICE": place.device},
            interrupt=True,
        )
        counts, failing = read(file) if file.exists() else ({}, [])
    place.note("counts", counts)
    place.note("failing", failing[:SHOWN])
    place.check("finished in time", not done.timed_out, done.verdict)
    place.check("tests ran", counts.get("tests", 0) > 0, done.tail)
    place.check("no test failed", not failing, f"{len(failing)} of {counts.get('tests', 0)}: see `failing`")


def read(file: Path) -> tuple[dict[str, int], list[str]]:
    """How many tests ended how, and for each that failed its name and first line."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failing = []
    for suite in xml.parse(file).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            for kind in ("failure", "error"):
                for found in case.iter(kind):
                    first = (found.get("message") or "").strip().split("\n")[0][:200]
                    failing.append(f"{case.get('classname')}::{case.get('name')}: {first}")
    return counts, failing
