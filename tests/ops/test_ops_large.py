"""More elements than a 32-bit index can tell apart. Needs 24 GiB and FUSEDAMP_BIG_TESTS=1."""

import os

import pytest
import torch
from fusedamp import ops
from op_calls import scalar

GIB = 2**30
MEMORY = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
COUNT = 2**31 + 5

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(os.environ.get("FUSEDAMP_BIG_TESTS") != "1", reason="FUSEDAMP_BIG_TESTS is not 1"),
    pytest.mark.skipif(MEMORY < 22 * GIB, reason="needs 24 GiB"),
]


def test_two_billion_gradients():
    """Every element is multiplied once, also the last; the one bad element at the very end is found and
    counted."""
    g = torch.ones(COUNT, dtype=torch.float16)
    found_inf = torch.zeros(())
    ops.unscale_([g], scalar(0.5), found_inf)
    assert found_inf.item() == 0.0
    for start in range(0, COUNT, GIB):
        assert bool((g[start : start + GIB] == 0.5).all())
    assert ops.grad_stats([g], None, 1.0).total.item() == COUNT / 2
    counted = torch.zeros(1, 3, dtype=torch.float64), torch.zeros(1, 64, dtype=torch.int64)
    g[-1] = 0.0
    ops.grad_numerics([g], *counted, torch.ones((), dtype=torch.int32))
    assert counted[0].tolist() == [[0.5, 1, 0]]
    assert counted[1][0, [0, 41]].tolist() == [1, COUNT - 1]
    g[-1] = float("nan")
    assert ops.grad_stats([g]).counts.tolist() == [[0, 1, 0]]
    ops.unscale_([g], scalar(0.5), found_inf)
    assert found_inf.item() == 1.0
    assert g[0].item() == g[-2].item() == 0.25
