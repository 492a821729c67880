"""``torch.set_default_device`` applies to the user's new tensors; fusedamp's are on the parameters'
device."""

import pytest
import torch
from fusedamp import GradScaler, optim


@pytest.fixture
def elsewhere():
    """A default device that is not the parameters', as on machines with a GPU."""
    before = torch.get_default_device()
    torch.set_default_device("meta")
    yield
    torch.set_default_device(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_do_not_depend_on_the_default_device(dtype, elsewhere):
    """From the third step on an optimizer repeats the call of the second from packed addresses."""
    param = torch.nn.Parameter(torch.ones(5, dtype=dtype, device="cpu"))
    optimizer, scaler = optim.AdamW([param], lr=0.1), GradScaler("cpu", init_scale=8.0, growth_interval=2)
    for _ in range(4):
        scaler.scale(param.float().sum()).backward()
        scaler.clip_grad_norm_(optimizer, 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    assert optimizer._plan is not None
    assert scaler.get_scale() == 32.0
    assert param.max() < 0.7
