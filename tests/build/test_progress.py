""".progress.py: what `make` shows while pip installs and compiles."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / ".progress.py"
pytestmark = pytest.mark.skipif(not SCRIPT.exists(), reason="not a source checkout")


@pytest.fixture
def run(tmp_path):
    """Run a copy of the script, in whose build folder there is an object of an earlier build."""
    copy = tmp_path / ".progress.py"
    copy.write_bytes(SCRIPT.read_bytes())
    objects = tmp_path / "build" / "objects-linux" / "fusedamp._C"
    objects.mkdir(parents=True)
    (objects / "old.o").touch()
    os.utime(objects / "old.o", (1, 1))

    def call(code, terminal=subprocess.PIPE):
        command = [sys.executable, copy, "torch: installs", "-c", code.replace("OBJECTS", repr(str(objects)))]
        return subprocess.run(command, stdout=terminal, stderr=subprocess.STDOUT, text=True)

    return call


def test_says_what_and_how_long(run, tmp_path):
    done = run("open(OBJECTS + '/new.o', 'w'); print('Collecting torch')")
    assert done.returncode == 0
    assert done.stdout.startswith(f"torch: installs (output: {tmp_path / 'build' / 'pip.log'})\n")
    assert done.stdout.endswith(" s, 1 file compiled: done\n")
    assert "Collecting torch" not in done.stdout
    assert (tmp_path / "build" / "pip.log").read_text() == "Collecting torch\n"


def test_a_failure_shows_the_output_and_the_status(run):
    done = run("import sys; print('no torch here'); sys.exit(3)")
    assert done.returncode == 3
    assert " s: FAILED\nno torch here\n" in done.stdout


def test_a_terminal_sees_each_second_what_pip_does(run):
    code = "import time; print('Downloading torch (880 MB)'); print('WARNING: x'); time.sleep(2.5)"
    ours, theirs = os.openpty()
    try:
        assert run(code, terminal=theirs).returncode == 0
        text = os.read(ours, 65536).decode()
    finally:
        os.close(theirs)
        os.close(ours)
    assert text.count("Downloading torch (880 MB)") >= 2
    assert "WARNING" not in text
    assert all(len(line) <= 80 for line in text.replace("\r", "\n").split("\n")[1:])
