"""torch.compile traces our scale(); torch's own is on Dynamo's skip list and always breaks the graph."""

import pytest
import torch
from fusedamp import GradScaler
from on_device import DEVICE


@pytest.mark.parametrize("started", [False, True])
def test_scale_is_traced_whole(started):
    scaler = GradScaler(DEVICE, init_scale=8.0)
    if started:
        scaler.scale(torch.ones(()))
    compiled = torch.compile(lambda x: scaler.scale((x * 2).sum()), fullgraph=True, backend="aot_eager")
    x = torch.ones(3, requires_grad=True)
    loss = compiled(x)
    loss.backward()
    assert loss.item() == 48.0
    assert torch.equal(x.grad, torch.full((3,), 16.0))
    assert scaler.get_scale() == 8.0
    scaler.update(2.0)
    assert compiled(x).item() == 12.0, "the scale is read at each call, not frozen into the graph"


def test_scale_of_a_list_is_traced():
    scaler = GradScaler(DEVICE, init_scale=8.0)
    compiled = torch.compile(lambda x: scaler.scale([x.sum(), (x, x)]), fullgraph=True, backend="aot_eager")
    total, (first, second) = compiled(torch.ones(2))
    assert total == 16
    assert torch.equal(first, second)


def test_disabled_scale_is_traced():
    scaler = GradScaler(DEVICE, enabled=False)
    assert torch.compile(scaler.scale, fullgraph=True, backend="eager")(torch.ones(())) == 1
