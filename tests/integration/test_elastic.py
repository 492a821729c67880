"""A rank is killed while it trains: torchrun starts all again from the last checkpoint, and the end has the
bits of a run that nothing stopped.
"""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SHARED = Path(__file__).resolve().parents[1] / "shared"
pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,
    pytest.mark.skipif(
        not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
        reason="needs torch.distributed with gloo",
    ),
]


def end_of(folder, *killed_at):
    """What training for 6 steps on 2 ranks ends with."""
    folder.mkdir()
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run += ["--max-restarts", "1", str(SHARED / "elastic_run.py"), str(folder), "6", *map(str, killed_at)]
    made = subprocess.run(run, capture_output=True, text=True, timeout=200)
    assert made.returncode == 0, made.stderr[-4000:]
    return torch.load(folder / "end.pt", weights_only=True)


def test_a_killed_rank_changes_nothing(tmp_path):
    expected = end_of(tmp_path / "unkilled")
    got = end_of(tmp_path / "killed", 4)
    assert (expected.pop("life"), got.pop("life")) == (0, 1)
    assert got.pop("scaler") == expected.pop("scaler")
    model = got.pop("model"), expected.pop("model")
    for ours, wanted in (model, (got, expected)):
        assert ours.keys() == wanted.keys()
        for name, value in wanted.items():
            same = torch.equal(ours[name], value) if isinstance(value, torch.Tensor) else ours[name] == value
            assert same, name
