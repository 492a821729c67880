"""Checkpoints that the installed libraries write themselves: bitsandbytes, optimi, torchao."""

import copy

import pytest
import torch
from fusedamp import optim
from fusedamp.checkpoints import convert
from torch import nn
from torch.nn import functional as F

pytestmark = [pytest.mark.host, pytest.mark.integration]
BATCHES = 40


def bitsandbytes(params):
    return pytest.importorskip("bitsandbytes").optim.AdamW(params, lr=1e-3)


def bitsandbytes_8_bit(params):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=1e-3)


def optimi(params):
    return pytest.importorskip("optimi").AdamW(params, lr=1e-3)


def torchao(params):
    return pytest.importorskip("torchao.optim").AdamW8bit(params, lr=1e-3)


@pytest.mark.parametrize("kind", ["AdamW8bit", "AdamW4bit", "AdamWFp8"])
def test_values_of_torchao(monkeypatch, kind):
    """Guards each of its formats: the values are those that it dequantizes itself."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    param = nn.Parameter(torch.randn(128, 64, generator=torch.Generator().manual_seed(0)))
    theirs = getattr(pytest.importorskip("torchao.optim"), kind)([param], lr=1e-3)
    for _ in range(3):
        param.grad = param.detach().square()
        theirs.step()
    ours = optim.AdamW([param], lr=1.0)
    ours.load_state_dict(convert(theirs.state_dict(), ours, "torchao"))
    for name in ("exp_avg", "exp_avg_sq"):
        values = theirs.state[param][name]
        assert type(values) is not torch.Tensor
        assert torch.equal(ours.state[param][name], values.dequantize())
    assert ours.state[param]["step"] == 3
    assert ours.param_groups[0]["lr"] == pytest.approx(1e-3)  # a tensor there


def train(model, optimizer, batches):
    """Steps toward the squares of the inputs' means; returns the distance that the weights travel."""
    before = [p.detach().float().clone() for p in model.parameters()]
    for seed in batches:
        x = torch.randn(32, 64, generator=torch.Generator().manual_seed(seed))
        x = x.to(next(model.parameters()).dtype)
        optimizer.zero_grad()
        F.mse_loss(model(x).float(), x.float().square()).backward()
        optimizer.step()
    return distance(model.parameters(), before)


def distance(some, others):
    squares = [
        (p.detach().float() - q.detach().float()).square().sum() for p, q in zip(some, others, strict=True)
    ]
    return torch.stack(squares).sum().sqrt().item()


# Relative to the distance traveled; fresh states would give about 0.1.
@pytest.mark.parametrize(
    ("make", "source", "dtype", "tolerance"),
    [
        (bitsandbytes, "bitsandbytes", torch.float32, 1e-4),
        (bitsandbytes_8_bit, "bitsandbytes", torch.float32, 3e-2),
        (optimi, "optimi", torch.float32, 1e-4),
        (optimi, "optimi", torch.bfloat16, 2e-2),
        (torchao, "torchao", torch.float32, 3e-2),
    ],
)
def test_training_continues(monkeypatch, make, source, dtype, tolerance):
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # torchao compiles its step
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype)
    theirs = make(model.parameters())
    train(model, theirs, range(BATCHES))
    twin = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).to(dtype)
    twin.load_state_dict(copy.deepcopy(model.state_dict()))
    ours = optim.AdamW(twin.parameters(), lr=1.0)
    with pytest.raises(ValueError, match=f'source="{source}"'):
        ours.load_state_dict(theirs.state_dict())
    ours.load_state_dict(convert(theirs.state_dict(), ours, source))
    traveled = train(model, theirs, range(BATCHES, 2 * BATCHES))
    train(twin, ours, range(BATCHES, 2 * BATCHES))
    apart = distance(model.parameters(), twin.parameters()) / traveled
    assert apart < tolerance
