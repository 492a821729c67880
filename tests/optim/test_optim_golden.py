"""Checkpoints of an earlier version load, and training continues with the same bits.

golden.pt has, for each optimizer with FP32 masters and with split masters and 8-bit states: options, the
state_dict after 4 steps, the weights then, and after 4 more. It was written by commit 808a531;
the weights after 4 more steps with 8-bit states again when random numbers changed.
"""

from pathlib import Path

import pytest
import torch
from cases import MAIN
from on_device import DEVICE, fetched

GOLDEN = torch.load(Path(__file__).parent / "golden.pt", map_location="cpu")
CASES = {case.name: case for case in MAIN}


def give_grads(params, step):
    generator = torch.Generator().manual_seed(100 + step)
    for param in params:
        param.grad = (torch.randn(param.shape, generator=generator, device="cpu") * 0.1).to(param)


@pytest.mark.parametrize("name", GOLDEN)
def test_runs_go_on(name):
    saved, case = GOLDEN[name], CASES[name.split()[0]]
    if DEVICE != "cpu" and not case.bitwise:
        pytest.skip("sums over a whole tensor differ between devices")
    params = [torch.nn.Parameter(weight.to(DEVICE)) for weight in saved["before"]]
    optimizer = case.ours(params, **saved["options"])
    optimizer.load_state_dict(saved["state"])
    for step in range(4, 8):
        give_grads(params, step)
        optimizer.step()
    for param, after in zip(fetched(params), saved["after"], strict=True):
        assert torch.equal(param, after)
