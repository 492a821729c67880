"""A CUDA error on a driver older than the CUDA runtime in the object has both versions.

The runtime is the real one; the driver is a stand-in.
"""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
DRIVER = "int cuDriverGetVersion(int* version) { *version = %d; return 0; }"
pytestmark = [
    pytest.mark.skipif(not (ROOT / "csrc").exists(), reason="not a source checkout"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    path = tmp_path_factory.mktemp("program") / "old_driver"
    source = ROOT / "tests/build/old_driver.cpp"
    subprocess.run(["nvcc", "-std=c++17", "-cudart", "static", source, "-o", path], check=True)
    return path


def first_call(program, driver, folder):
    """Run the program with a driver of this version; return what it says."""
    (folder / "driver.c").write_text(DRIVER % driver)
    library = folder / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-fPIC", folder / "driver.c", "-o", library], check=True)
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder)}
    return subprocess.run(
        [program], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()


def test_an_old_driver_is_named_with_both_versions(program, tmp_path):
    text = first_call(program, 11080, tmp_path)
    what = "CUDA driver version is insufficient for CUDA runtime version"
    versions = r"The driver supports CUDA 11\.8, and fusedamp was built with CUDA \d+\.\d"
    way_out = r"update the driver, or build fusedamp with CUDA 11\.8 or earlier\."
    assert re.fullmatch(rf"{what}\. {versions}: {way_out}", text)


def test_a_newer_driver_is_not(program, tmp_path):
    """It fails here for another reason: the stand-in has no devices."""
    assert "driver supports" not in first_call(program, 99000, tmp_path)
