"""Weights and gradients in large buffers: training is bitwise equal; errors change nothing."""

import copy
import io
from itertools import pairwise

import pytest
import torch
from fusedamp import GradScaler, PackedParameters, optim, pack_parameters
from on_device import DEVICE
from torch import nn


def model():
    torch.manual_seed(0)
    made = nn.Sequential(nn.Conv2d(3, 5, 3), nn.Flatten(), nn.Linear(20, 7), nn.ReLU(), nn.Linear(7, 2))
    made[0].weight.data = made[0].weight.data.contiguous(memory_format=torch.channels_last)
    return made


def train(net, zero_grad, steps=4, **options):
    optimizer, scaler = optim.AdamW(net.parameters(), **options), GradScaler(DEVICE, init_scale=2.0**10)
    for step in range(steps):
        torch.manual_seed(step)
        zero_grad(optimizer)
        scaler.scale(net(torch.randn(4, 3, 4, 4).to(net[0].weight.dtype)).float().square().mean()).backward()
        scaler.clip_grad_norm_(optimizer, 0.5)
        scaler.step(optimizer)
        scaler.update()
    return optimizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_training_is_the_same(dtype, gradients):
    plain, net = model().to(dtype), model().to(dtype)
    packed = pack_parameters(net, gradients=gradients)
    assert isinstance(packed, PackedParameters)
    train(plain, lambda optimizer: optimizer.zero_grad())
    train(net, lambda optimizer: packed.zero_grad() if gradients else optimizer.zero_grad())
    for one, two in zip(plain.parameters(), net.parameters(), strict=True):
        assert torch.equal(one, two)
        assert one.stride() == two.stride()
        if gradients:
            assert torch.equal(one.grad, two.grad)


def spans(tensors):
    return sorted((t.data_ptr(), t.data_ptr() + t.nbytes) for t in tensors if t.numel())


def test_all_lies_in_the_buffers():
    net = model()
    net[2].bfloat16()
    net[4].weight.requires_grad_(False)
    frozen = net[4].weight.data_ptr()
    values = [param.detach().clone() for param in net.parameters()]
    packed = pack_parameters(net)
    assert {buffer.dtype for buffer in packed.weights} == {torch.float32, torch.bfloat16}
    assert [g.dtype for g in packed.gradients] == [w.dtype for w in packed.weights]
    assert net[4].weight.data_ptr() == frozen
    assert net[4].weight.grad is None
    for param, value in zip(net.parameters(), values, strict=True):
        assert torch.equal(param, value)
        if not param.requires_grad:
            continue
        for tensor, buffers in ((param, packed.weights), (param.grad, packed.gradients)):
            (begin, end), *_ = spans([tensor])
            assert any(a <= begin and end <= b for a, b in spans(buffers))
            assert begin % 64 == 0 or DEVICE != "cpu"
    found = spans(
        [p for p in net.parameters() if p.requires_grad]
        + [p.grad for p in net.parameters() if p.requires_grad]
    )
    assert all(end <= begin for (_, end), (begin, _) in pairwise(found))


def test_gradients_stay_in_their_places():
    net = model()
    net(torch.randn(1, 3, 4, 4)).sum().backward()
    before = [param.grad.clone() for param in net.parameters()]
    packed = pack_parameters(net)
    assert all(torch.equal(param.grad, grad) for param, grad in zip(net.parameters(), before, strict=True))
    places = [param.grad.data_ptr() for param in net.parameters()]
    for forget in (lambda: None, net.zero_grad, lambda: net.zero_grad(set_to_none=False)):
        forget()
        packed.zero_grad()
        assert all((param.grad == 0).all() for param in net.parameters())
        net(torch.randn(1, 3, 4, 4)).sum().backward()
        assert [param.grad.data_ptr() for param in net.parameters()] == places


def test_odd_parameters_and_checkpoints():
    """0-dim, empty, of one element; a state dict goes through a file, and loads into a plain model."""
    params = [nn.Parameter(torch.randn(shape)) for shape in ((), (0,), (1,), (3, 5), (2, 0))]
    net = nn.ParameterList(params)
    plain = copy.deepcopy(net)
    pack_parameters(net)
    file = io.BytesIO()
    torch.save(net.state_dict(), file)
    file.seek(0)
    plain.load_state_dict(torch.load(file))
    assert all(map(torch.equal, net, plain))
    assert not pack_parameters([]).weights
    twin = copy.deepcopy(net)  # of views: values are kept
    assert all(map(torch.equal, net, twin))


class Special(nn.Parameter):
    pass


SHARED = nn.Parameter(torch.zeros(4))
REFUSED = {
    "non-leaf": ([torch.ones(2, requires_grad=True) * 2], TypeError, "leaf: False"),
    "no tensor": ([3], TypeError, "got a int; expected parameters"),
    "meta": ([nn.Parameter(torch.empty(2, device="meta"))], TypeError, "on meta"),
    "subclass": ([Special(torch.ones(2))], TypeError, "is a Special"),
    "gaps": ([nn.Parameter(torch.ones(4)[::2])], ValueError, "has gaps or overlaps in memory"),
    "twice": ([SHARED, SHARED], ValueError, "parameters 0 and 1 share memory"),
    "view": ([SHARED, nn.Parameter(SHARED.detach()[2:])], ValueError, "parameters 0 and 1 share memory"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_stays_as_it_was(case):
    params, error, text = REFUSED[case]
    good = nn.Parameter(torch.ones(3))
    place = good.data_ptr()
    with pytest.raises(error, match=text):
        pack_parameters([*params, good])
    assert good.data_ptr() == place
    assert good.grad is None


def test_one_parameter_and_what_is_no_parameter():
    param = nn.Parameter(torch.arange(6.0).view(2, 3))
    packed = pack_parameters(param)
    assert param.grad is not None
    assert packed.weights[0][:6].tolist() == [0, 1, 2, 3, 4, 5]
    with pytest.raises(TypeError, match="got a int; expected parameters"):
        pack_parameters(3)
