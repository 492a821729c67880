"""Runs pytest with ``FUSEDAMP_TEST_DEVICE``: every test that does not name a device runs on the GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path
from typing import Any

from ..borrowed import on_device
from ..place import Place, Skip
from ..process import execute

SLOWEST = 25  # tests whose times are recorded
LONGEST_MESSAGE = 300
TINY = ["tests/ops/test_ops_scale.py", "-k", "hysteresis"]


def run(place: Place) -> None:
    if importlib.util.find_spec("pytest") is None:
        raise Skip("pytest is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--tb=short"]
    command += ["-m", "not host", f"--durations={SLOWEST}"]
    # Modules about the host test nothing on the device, and take most of the time.
    left_out = [f"--ignore-glob=*/{module}.py" for module in on_device.HOST_ONLY.split()]
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
    place.note("failing", grouped(failing))
    place.note("failing_cases", [f"{case['test']}{case['case']}: {case['message']}" for case in failing])
    place.note("slowest", re.findall(r"^([\d.]+s \w+) +(\S.*)$", done.output, flags=re.M)[:SLOWEST])
    place.check("finished in time", not done.timed_out, done.verdict)
    place.check("tests ran", counts.get("tests", 0) > 0, done.tail)
    place.check("no test failed", not failing, f"{len(failing)} of {counts.get('tests', 0)}: see `failing`")


def read(file: Path) -> tuple[dict[str, int], list[dict[str, str]]]:
    """Count the tests by outcome; returns name, first line and place of each failure."""
    counts = {"tests": 0, "failures": 0, "errors": 0, "skipped": 0}
    failing = []
    for suite in xml.parse(file).getroot().iter("testsuite"):
        for name in counts:
            counts[name] += int(suite.get(name, 0))
        for case in suite.iter("testcase"):
            for kind in ("failure", "error"):
                for found in case.iter(kind):
                    function, bracket, parameters = (case.get("name") or "").partition("[")
                    lines = (found.get("message") or "").strip().split("\n")
                    places = re.findall(r"^(\S+?:\d+): ", found.text or "", flags=re.M)
                    failing.append(
                        {
                            "test": f"{case.get('classname')}::{function}",
                            "case": bracket + parameters,
                            "message": lines[0][:LONGEST_MESSAGE],
                            "place": places[-1] if places else "",
                        }
                    )
    return counts, failing


def grouped(failing: list[dict[str, str]]) -> list[dict[str, Any]]:
    """Group failures by test function: number of failed cases, and the first one."""
    counts = Counter(case["test"] for case in failing)
    first = {case["test"]: case for case in reversed(failing)}
    return [{"cases": count, **first[test]} for test, count in counts.items()]
