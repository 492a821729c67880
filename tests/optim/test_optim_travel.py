"""States of every format through torch's own collectives, on 2 and 4 gloo ranks: gathered, offloaded,
broadcast from rank 0, redistributed, and saved on n ranks and loaded on m.

gloo and NCCL move no int16, which is what a split master's remainder is made of.
"""

import copy
from functools import partial

import pytest
import torch
from cases import BY_NAME, kept
from fusedamp import optim
from fusedamp.tensors import travel
from ranks import agreed, needs_gloo, rank, spawned
from sharded_net import FORMATS, REPLICATED, network, same_states, sharded, train, whole

dist = torch.distributed
pytestmark = needs_gloo


def gathered(case, dtype, options, offload):
    """A full state dict has the whole tensors of one process, and loads into it and back."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net, reference = sharded(dtype), network(dtype)
    ours, expected = (BY_NAME[case].ours(m.parameters(), lr=0.1, **options) for m in (net, reference))
    train(net, ours, range(3))
    train(reference, expected, range(3))
    full = StateDictOptions(full_state_dict=True, cpu_offload=offload)
    saved = get_optimizer_state_dict(net, ours, options=full)
    wanted = get_optimizer_state_dict(reference, expected)
    if rank() == 0 or not offload:  # with offload, rank 0 alone has it
        assert saved["state"].keys() == wanted["state"].keys()
        for name, entry in wanted["state"].items():
            for key, value in entry.items():
                got = saved["state"][name][key]
                assert torch.equal(got, value) if isinstance(value, torch.Tensor) else got == value, (
                    name,
                    key,
                )
    # Loaded into fresh ones: from every rank's copy, and from rank 0's alone.
    for broadcast in (False, True) if not offload else (True,):
        other = sharded(dtype)
        again = BY_NAME[case].ours(other.parameters(), lr=0.1, **options)
        with torch.no_grad():
            for p, q in zip(other.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        given = copy.deepcopy(saved) if rank() == 0 or not broadcast else {}
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        set_optimizer_state_dict(other, again, given, options=how)
        train(other, again, [7, 8])
        continued, after = copy.deepcopy(reference), BY_NAME[case].ours([torch.nn.Parameter(torch.ones(1))])
        after = BY_NAME[case].ours(continued.parameters(), lr=0.1, **options)
        after.load_state_dict(expected.state_dict())
        train(continued, after, [7, 8])
        same_states(other, again, continued, after)


def replicated(case, dtype, options):
    """States of plain tensors, from rank 0 to all."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    net = network(dtype)
    optimizer = BY_NAME[case].ours(net.parameters(), lr=0.1, **options)
    train(net, optimizer, range(2 if rank() == 0 else 1))
    saved = get_optimizer_state_dict(net, optimizer)
    with torch.no_grad():
        for p in net.parameters():
            dist.broadcast(p, 0)
    how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(net, optimizer, saved if rank() == 0 else {}, options=how)
    train(net, optimizer, [5])
    for p in net.parameters():
        agreed([p.tolist(), [v.tolist() for v in kept(optimizer.state[p]).values()]])


def redistributed(dtype):
    """A remainder that was placed elsewhere comes back to its weight, bit for bit."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    net, reference = sharded(dtype), network(dtype)
    ours, expected = (optim.AdamW(m.parameters(), lr=0.1, master_weights="split") for m in (net, reference))
    for seed in range(3):
        train(net, ours, [seed])
        train(reference, expected, [seed])
        for p in net.parameters():
            entry = ours.state[p]
            placement = Replicate() if seed == 0 else Shard(p.dim() - 1)
            moved = travel.as_bytes(entry["master"]).redistribute(placements=[placement])
            entry["master"] = travel.from_bytes(moved)
            assert isinstance(entry["master"], DTensor)
            assert entry["master"].placements == (placement,)
    train(net, ours, [9])
    train(reference, expected, [9])
    same_states(net, ours, reference, expected)


def on_another_mesh():
    """A state dict of a mesh of another shape, between which torch redistributes nothing."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh, other = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    value = torch.randn(5, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    made = []
    for place in ((mesh, [Shard(0)]), (other, [Replicate(), Shard(0)]), None):
        p = torch.nn.Parameter(value.clone() if place is None else distribute_tensor(value, *place))
        made.append((p, optim.AdamW([p], lr=0.1, master_weights="split")))
    (p, ours), (q, theirs), (single, one) = made
    for optimizer, param in ((theirs, q), (one, single)):
        grad = torch.arange(15.0).view(5, 3).bfloat16()
        param.grad = grad if param is single else distribute_tensor(grad, q.device_mesh, q.placements)
        optimizer.step()
    with torch.no_grad():
        p.copy_(distribute_tensor(single.detach(), mesh, [Shard(0)]))
    ours.load_state_dict(theirs.state_dict())
    for name, wanted in kept(one.state[single]).items():
        assert torch.equal(whole(kept(ours.state[p])[name]), whole(wanted)), name


def plain_into_sharded(dtype):
    """One process's checkpoint loads on every rank, and a sharded one into whole parameters."""
    net, reference = sharded(dtype), network(dtype)
    ours, expected = (optim.AdamW(m.parameters(), lr=0.1, master_weights="split") for m in (net, reference))
    train(reference, expected, range(2))
    train(net, ours, range(1))
    with torch.no_grad():
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            p.copy_(torch.distributed.tensor.distribute_tensor(q.detach(), p.device_mesh, p.placements))
    ours.load_state_dict(expected.state_dict())
    same_states(net, ours, reference, expected)
    train(net, ours, [4])
    train(reference, expected, [4])
    same_states(net, ours, reference, expected)
    other = network(dtype)
    with torch.no_grad():
        for p, q in zip(other.parameters(), reference.parameters(), strict=True):
            p.copy_(q)
    back = optim.AdamW(other.parameters(), lr=0.1, master_weights="split")
    back.load_state_dict(ours.state_dict())
    same_states(other, back, reference, expected)


HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
TWO = {
    f"gathered, {case}, {name}, {form}{', offloaded' * offload}": partial(
        gathered, case, dtype, FORMATS[form], offload
    )
    for case in ("adamw", "sgd-nesterov")
    for name, dtype in HALVES.items()
    for form in FORMATS
    for offload in (False, True)
    if not offload or form == "split"
    if name == "bf16" or form.startswith("split")
    if case == "adamw" or (name, form) == ("bf16", "split")
}
SCENARIOS = {
    2: TWO
    | {
        f"replicated, {name}, {form}": partial(replicated, "adamw", dtype, REPLICATED[form])
        for name, dtype in HALVES.items()
        for form in REPLICATED
        if name == "bf16" or form == "split"
    }
    | {f"redistributed, {name}": partial(redistributed, dtype) for name, dtype in HALVES.items()}
    | {
        "on another mesh": on_another_mesh,
    }
    | {f"plain into sharded, {name}": partial(plain_into_sharded, dtype) for name, dtype in HALVES.items()},
    4: {name: TWO[name] for name in TWO if "adamw, bf16, split" in name}
    | {"redistributed": partial(redistributed, torch.bfloat16)},
}
ranks, test_on_ranks = spawned(SCENARIOS)


@pytest.mark.parametrize("shape", [(), (0,), (3,), (4, 5)], ids=str)
def test_bytes_and_back(shape):
    """Guards every bit pattern, views (no copies), and bytes that came back in another layout."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)[
        : max(1, torch.Size(shape).numel())
    ]
    bits = bits[: torch.Size(shape).numel()].reshape(shape)
    saved = travel.as_bytes(bits)
    assert saved.dtype == torch.uint8
    assert saved.shape == (*shape, 2)
    assert travel.holds_bytes(saved, bits.shape)
    assert saved.data_ptr() == bits.data_ptr()
    assert torch.equal(travel.from_bytes(saved), bits)
    odd = torch.empty(saved.numel() + 1, dtype=torch.uint8)[1:].view(saved.shape).copy_(saved)
    apart = torch.empty(*shape, 2, 3, dtype=torch.uint8)[..., 0].copy_(saved)
    for other in (odd, apart):
        assert torch.equal(travel.from_bytes(other), bits)
