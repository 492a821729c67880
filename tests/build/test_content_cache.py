"""The store of tables that are on the device already, which only CUDA uses, on the CPU."""

import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source checkout")
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_content_cache(tmp_path):
    """Guards against stale addresses on the device: other content is never taken for known content."""
    binary, source = tmp_path / "content_cache", ROOT / "tests/build/content_cache.cpp"
    flags = ["-std=c++17", "-g", "-Wall", "-Wextra", "-Werror", "-fsanitize=address,undefined"]
    subprocess.run(["g++", *flags, str(source), "-o", str(binary)], check=True)
    done = subprocess.run([str(binary)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "ok\n"), done.stdout + done.stderr
