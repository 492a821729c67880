"""The examples run, learn, and print what they claim."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import fusedamp.nn
import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
pytestmark = pytest.mark.skipif(not EXAMPLES.is_dir(), reason="not a source checkout")


def printed(capsys, dtype: str) -> tuple[list[float], str]:
    """Run the example; returns the losses, and the share of unrounded gradients."""
    runpy.run_path(str(EXAMPLES / "micro_batches.py"))["main"](["--dtype", dtype, "--device", "cpu"])
    text = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", text)]
    return losses, re.search(r"micro-batch (\d+)% of", text)[1]


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_micro_batches(dtype, capsys):
    losses, share = printed(capsys, dtype)
    assert losses[0] > 2
    assert losses[-1] < 0.2
    assert int(share) > 90


def test_offload(capsys):
    for steps in (5, 50):
        main = runpy.run_path(str(EXAMPLES / "offload.py"))["main"]
        main(["--device", "cpu", "--steps", str(steps)])
    text = capsys.readouterr().out
    losses = [float(found) for found in re.findall(r"loss ([\d.]+)", text)]
    assert losses[0] > 2
    assert losses[-1] < 0.4
    assert "4.0 on the device, 10.0 on the host" in text


def test_nn_linear_rounds_as_the_example_says(monkeypatch, capsys):
    monkeypatch.setattr(fusedamp.nn, "convert", lambda model: model)
    assert printed(capsys, "bf16")[1] == "0"
