"""Offload: what is refused, by name and before anything changes."""

import pytest
import torch
from cases import make_params
from fusedamp import optim
from fusedamp.optim.offload import offloaded as module
from pretend_device import Memory, Pretended, Traffic, loss_of, pair, step, twins

HALF = torch.bfloat16


def refused(moved, offloaded, error, match):
    offloaded.link.settle()
    before = [p.detach().clone() for p in moved]
    with Traffic(offloaded) as traffic, pytest.raises(error, match=match):
        offloaded.step()
    offloaded.link.settle()
    assert traffic.up == 0
    assert all(map(torch.equal, before, moved))
    assert all(entry["step"] == 0 for entry in offloaded.state.values())


def test_bad_gradients_are_refused():
    _, _, moved, offloaded = pair([(4, 4), (4,)])
    moved[0].grad = torch.zeros_like(moved[0])
    moved[1].main_grad = torch.zeros(5)
    refused(
        moved, offloaded, ValueError, r"\[Offloaded\] group 0: params\[1\] has a gradient of shape \[5\] on"
    )
    moved[1].main_grad = torch.zeros(4, dtype=torch.float64)
    refused(moved, offloaded, ValueError, r"params\[1\] has a gradient of shape \[4\], torch.float64")
    moved[1].main_grad = torch.zeros(4).to_sparse()
    refused(moved, offloaded, RuntimeError, "does not support sparse gradients")


def test_bad_options_are_refused():
    _, _, moved, offloaded = pair([(4, 4), (4,)])
    loss_of(moved, 0).backward()
    offloaded.param_groups[0]["lr"] = -1.0
    refused(moved, offloaded, ValueError, r"\[AdamW\] group 0: lr is -1.0")


def test_parameters_that_share_memory_are_refused():
    memory = Memory()
    (param,) = twins(memory, make_params(HALF, [(4, 4)]))
    other = torch.nn.Parameter(param.data[1:])
    offloaded = Pretended(memory, optim.SGD, [param, other])
    for p in (param, other):
        p.grad = torch.zeros_like(p)
    with pytest.raises(ValueError, match="two parameters share memory"):
        offloaded.step()
    overlapping = torch.nn.Parameter(torch.zeros(1, 3).expand(4, 3))
    offloaded = Pretended(Memory(), optim.SGD, [overlapping])
    overlapping.grad = torch.zeros(4, 3)
    with pytest.raises(ValueError, match="elements share an address"):
        offloaded.step()


def test_graph_capture_is_refused(monkeypatch):
    _, _, moved, offloaded = pair()
    loss_of(moved, 0).backward()
    monkeypatch.setattr(module, "_is_capturing", lambda param: True)
    with pytest.raises(RuntimeError, match=r"\[Offloaded.step\] a CUDA graph is being captured"):
        offloaded.step()
    with Traffic(offloaded) as traffic:
        loss_of(moved, 0).backward()
        offloaded.link.settle()
    assert traffic.down == 0


class Stepping(optim.AdamW):
    def step(self, closure=None):
        return super().step(closure)


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((torch.optim.AdamW, []), TypeError, r"\[Offloaded\] optimizer_class is .*AdamW"),
        (([], optim.AdamW), TypeError, r"\[Offloaded\] optimizer_class is \[\]"),
        ((Stepping, []), TypeError, "Stepping overrides step"),
        ((optim.AdamW, []), ValueError, "empty parameter list"),
        ((optim.AdamW, torch.zeros(2)), TypeError, "iterable of Tensors"),
        ((optim.AdamW, [torch.zeros(2), 3]), TypeError, "can only optimize Tensors"),
    ],
)
def test_bad_arguments(arguments, error, match):
    with pytest.raises(error, match=match):
        optim.Offloaded(*arguments)


def test_bad_groups():
    (param,) = make_params(HALF, [(3,)])
    with pytest.raises(ValueError, match=r"\[AdamW\] lr is -1"):
        optim.Offloaded(optim.AdamW, [param], lr=-1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
        optim.Offloaded(optim.AdamW, [param], momentum=0.9)
    with pytest.raises(ValueError, match=r"\[Offloaded\] group 0: a parameter is given twice"):
        optim.Offloaded(optim.AdamW, [param, param])
    offloaded = optim.Offloaded(optim.AdamW, [param])
    (other,) = make_params(HALF, [(3,)])
    for group, match in [
        ({"params": [other], "lr": -1}, r"\[AdamW\] group 1: lr is -1"),
        ({"params": [param]}, "more than one parameter group"),
    ]:
        with pytest.raises(ValueError, match=match):
            offloaded.add_param_group(group)
        assert len(offloaded.param_groups) == len(offloaded._mirror.host.param_groups) == 1
        assert list(offloaded._mirror.twins) == [param]
    step([param], offloaded, 0)
