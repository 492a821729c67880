"""Same bits on every instruction set and for every number of threads, norms included; rounding checked
exhaustively."""

import functools
import os
import subprocess
import sys
from pathlib import Path

import op_battery
import pytest
from fusedamp import _C
from fusedamp.ops import library
from op_calls import HALVES

SHARED = Path(op_battery.__file__).parent
TARGETS = _C.build_info()["cpu_targets"]


@functools.cache
def run_with(target, code="import op_battery; op_battery.main()"):
    environment = os.environ | {
        "FUSEDAMP_CPU_TARGET": target,
        "PYTHONPATH": os.pathsep.join([str(SHARED), *sys.path]),
    }
    return subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def here():
    return op_battery.digest()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_rounding(dtype):
    """All 2^16 16-bit inputs; float32 by all its upper halves, ties and their neighbors, subnormals, NaN."""
    op_battery.check_widening(dtype)
    op_battery.check_narrowing(dtype)


@pytest.mark.parametrize("count", [1, 3])
def test_threads(count, threads, here):
    threads(count)
    assert op_battery.digest() == here


@pytest.mark.parametrize("target", TARGETS)
def test_instruction_sets(target, here):
    """Another process on `target` rounds as torch does, and finds the very bits of this one."""
    done = run_with(target)
    if "not on this processor" in done.stderr:
        pytest.skip(f"this processor has no {target}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"{target} {here}"


@pytest.mark.skipif(bool(os.environ.get("FUSEDAMP_CPU_TARGET")), reason="FUSEDAMP_CPU_TARGET chooses")
def test_the_best_instruction_set_is_chosen():
    """The first of the list that this processor has."""
    best_first = [target for target in ("avx512", "avx2", "baseline") if target in TARGETS]
    assert library.cpu_target() == next(
        t for t in best_first if "not on this processor" not in run_with(t).stderr
    )


def test_unknown_instruction_set():
    code = """
import torch
from fusedamp import ops
g, found_inf = [torch.ones(3)], torch.zeros(())
try:
    ops.unscale_(g, torch.full((), 0.5), found_inf)
except Exception as error:
    print(type(error).__name__, error)
assert g[0].tolist() == [1.0] * 3
"""
    done = run_with("bogus", code)
    assert done.returncode == 0, done.stderr
    assert "FUSEDAMP_CPU_TARGET=bogus cannot be used; expected one of: " in done.stdout
    for target in TARGETS:
        assert target in done.stdout
    assert "Unset it to let fusedamp choose" in done.stdout
