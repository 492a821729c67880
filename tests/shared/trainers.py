"""What tests of other projects' trainers on several ranks share: a net, its data, and comparisons."""

import os

import torch
from ranks import agreed, rank
from torch import nn

WHY = "pip install fusedamp[integrations] to run it"
LR, STEPS = 1e-2, 6


def as_torchrun():
    """Set the variables of torchrun, which trainers read, for the process group that is there."""
    world = str(torch.distributed.get_world_size())
    os.environ.update(
        RANK=str(rank()),
        LOCAL_RANK=str(rank()),
        WORLD_SIZE=world,
        LOCAL_WORLD_SIZE=world,
        GROUP_RANK="0",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT="29500",  # unused: the group exists
        TORCHELASTIC_RUN_ID="test",
    )


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)


def rows(count=64):
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(0))
    return x, x @ torch.tensor([[1.0], [-2.0], [0.5], [3.0]])


class Model(nn.Module):
    """Returns its loss, as the Hugging Face Trainer expects."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.net = net(dtype)

    def forward(self, x, labels):
        return {"loss": nn.functional.mse_loss(self.net(x.to(self.net[0].weight.dtype)).float(), labels)}


def weights(model):
    """The whole weights, alike on all ranks."""
    with torch.no_grad():
        values = [p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for p in model.parameters()]
    agreed([value.tolist() for value in values])
    return values


def equal(got, wanted):
    assert len(got) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


def close(got, wanted, steps=STEPS):
    """Two AdamW in FP32: each rounds a step of about lr some 16 times, and the weight once; the gradients of
    this net carry a difference of weights on, with a factor below 10 over these steps."""
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=10 * steps * 2.0**-24, atol=10 * steps * 16 * LR * 2.0**-24)
