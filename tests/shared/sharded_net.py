"""A tiny net, whole or sharded, with the same whole gradients for every placement."""

import torch
from fusedamp.optim.state.encoded import plain
from fusedamp.tensors import travel
from torch import nn

FORMATS = {
    "fp32": {},
    "split": {"master_weights": "split"},
    "split, bf16": {"master_weights": "split", "state_dtype": "bfloat16", "rounding_seed": 3},
    "none, rounded": {"master_weights": "none", "stochastic_rounding": True, "rounding_seed": 3},
}
REPLICATED = FORMATS | {"split, int8": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3}}


def network(dtype=torch.bfloat16):
    """Sizes that no world divides, and a weight of one row, of which some ranks have nothing."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 1, bias=False), nn.Linear(1, 3)).to(dtype)


def sharded(dtype=torch.bfloat16):
    from torch.distributed.fsdp import fully_shard

    net = network(dtype)
    for layer in (*net, net):
        fully_shard(layer)
    return net


def train(net, optimizer, seeds):
    """Gradients that depend on the step alone, so every placement sees the same whole ones."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        for p in net.parameters():
            grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        optimizer.step()
        optimizer.zero_grad()


def whole(value):
    """A state as one plain tensor on every rank; the bits of remainders as they are."""
    value = plain(value) if isinstance(value, torch.Tensor) else value
    if not hasattr(value, "full_tensor"):
        return value
    if value.dtype == torch.int16:
        return travel.from_bytes(travel.as_bytes(value).full_tensor())
    return value.full_tensor()


def same_states(net, optimizer, reference, expected):
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        assert torch.equal(whole(p.detach()), q)
        entry, wanted = optimizer.state[p], expected.state[q]
        assert entry.keys() == wanted.keys()
        for name, value in entry.items():
            a, b = whole(value), whole(wanted[name])
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, name
