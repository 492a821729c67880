"""Offload on two ranks (gloo): FSDP2 and DistributedDataParallel, with the bits of the plain optimizer."""

import io
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from fusedamp import GradScaler, optim
from fusedamp.checkpoints import fp32_state_dict
from pretend_device import Memory, Pretended, Traffic
from ranks import needs_gloo, run_scenarios
from torch import nn

pytestmark = needs_gloo
WORLD = 2
SPLIT = {"lr": 1e-2, "master_weights": "split", "state_dtype": torch.bfloat16, "rounding_seed": 3}


def net(dtype=torch.bfloat16):
    """Sizes that 2 does not divide, and a weight of one row: a rank without a part of it."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 9), nn.Linear(9, 1)).to(dtype)


def train(model, optimizer, steps=range(6), micro=1):
    rank, scaler = torch.distributed.get_rank(), GradScaler("cpu", init_scale=16.0)
    for s in steps:
        optimizer.zero_grad()
        for m in range(micro):
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(100 * s + 10 * m + rank))
            if s == 2 and rank == 1:  # an overflow in one rank's batch
                x[0, 0] = torch.inf
            loss = model(x.to(next(model.parameters()).dtype)).float().square().sum()
            scaler.scale(loss).backward()
        if s % 2:
            scaler.clip_grad_norm_(optimizer, 0.1)
        scaler.step(optimizer)
        scaler.update()
        if hasattr(optimizer, "link"):
            optimizer.link.settle()
    return scaler.state_dict()


def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def assert_same(one, other):
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(local(p), local(q))


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for layer in model:
        fully_shard(layer)
    return fully_shard(model)


def fsdp2(options, dtype=torch.bfloat16):
    plain, offloaded = sharded(net(dtype)), sharded(net(dtype))
    one = optim.AdamW(plain.parameters(), **options)
    other = Pretended(Memory(), optim.AdamW, offloaded.parameters(), **options)
    assert train(plain, one, micro=2) == train(offloaded, other, micro=2)
    assert_same(plain, offloaded)
    wide = [fp32_state_dict(model, o) for model, o in ((plain, one), (offloaded, other))]
    assert all(torch.equal(local(wide[0][name]), local(wide[1][name])) for name in wide[0])
    with Traffic(other) as traffic:  # only shards cross
        train(offloaded, other, [7])
    assert traffic.down < 0.75 * 2 * dtype.itemsize


def fsdp2_copies_in_the_backward_pass():
    model = sharded(net())
    optimizer = Pretended(Memory(), optim.AdamW, model.parameters(), late=False)
    train(model, optimizer, [0])
    with Traffic(optimizer) as traffic:
        model(torch.ones(4, 7, dtype=torch.bfloat16)).sum().backward()
    assert traffic.down > 0


def fsdp2_checkpoints(full):
    """State dicts as torch gathers them, in both directions."""
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )

    models = [sharded(net()) for _ in range(3)]
    plain = optim.AdamW(models[0].parameters(), **SPLIT)
    others = [optim.Offloaded(optim.AdamW, model.parameters(), **SPLIT) for model in models[1:]]
    options, saved = StateDictOptions(full_state_dict=full), []
    for model, optimizer in zip(models[:2], (plain, others[0]), strict=True):
        train(model, optimizer, range(2))
        saved.append(get_optimizer_state_dict(model, optimizer, options=options))
    for name, entry in saved[0]["state"].items():
        for key, value in entry.items():
            found = saved[1]["state"][name][key]
            assert type(found) is type(value), (name, key)
            assert not isinstance(value, torch.Tensor) or torch.equal(local(found), local(value)), (name, key)
    models[2].load_state_dict(models[0].state_dict())
    set_optimizer_state_dict(models[2], others[1], saved[0], options=options)
    for steps in (range(3, 5), range(5, 7)):
        train(models[0], plain, steps)
        train(models[2], others[1], steps)
        assert_same(models[0], models[2])
        plain.load_state_dict(others[1].state_dict())


def whole_checkpoint_into_shards():
    """A checkpoint without sharding, with split masters: each rank takes its rows."""
    whole, model = net(), sharded(net())
    source = optim.AdamW(whole.parameters(), **SPLIT)
    train(whole, source, range(2))
    optimizer = optim.Offloaded(optim.AdamW, model.parameters(), **SPLIT)
    optimizer.load_state_dict(source.state_dict())
    rows = torch.chunk(source.state_dict()["state"][0]["master"], WORLD)[torch.distributed.get_rank()]
    assert torch.equal(local(optimizer.state_dict()["state"][0]["master"]), rows)
    for param in model.parameters():
        assert optimizer.state[param]["exp_avg"].shape == local(param).shape


def fsdp2_in_backward():
    """step_in_backward: each shard is updated when its gradient has been reduced."""
    plain, released = sharded(net()), sharded(net())
    one, other = (optim.AdamW(model.parameters(), **SPLIT) for model in (plain, released))
    optim.step_in_backward(other)
    for s in range(4):
        for model, optimizer in ((plain, one), (released, other)):
            x = torch.randn(4, 7, generator=torch.Generator().manual_seed(s)).bfloat16()
            model(x).float().square().sum().backward()
            assert optimizer is one or all(p.grad is None for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        assert_same(plain, released)


def dcp_saves_and_loads(folder):
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    first, second = sharded(net()), sharded(net())
    one = optim.Offloaded(optim.AdamW, first.parameters(), **SPLIT)
    train(first, one, range(2))
    dcp.save(
        {"model": first.state_dict(), "optimizer": get_optimizer_state_dict(first, one)}, checkpoint_id=folder
    )
    two = optim.AdamW(second.parameters(), **SPLIT)
    target = {"model": second.state_dict(), "optimizer": get_optimizer_state_dict(second, two)}
    dcp.load(target, checkpoint_id=folder)
    second.load_state_dict(target["model"])
    set_optimizer_state_dict(second, two, target["optimizer"])
    train(first, one, range(3, 5))
    train(second, two, range(3, 5))
    assert_same(first, second)


def refusals():
    """What needs whole tensors raises as without offload, before anything is written."""
    for kind, options, match in [
        (optim.LAMB, {}, "is a DTensor of shape .* for LAMB .* expected a rule for elements"),
        (optim.Muon, {}, "is a DTensor of shape .* for Muon .* expected a rule for elements"),
        (
            optim.AdamW,
            {"state_dtype": "int8"},
            "is a DTensor .* state_dtype 'int8'; expected .* without 8-bit",
        ),
    ]:
        model = sharded(net())
        optimizer = optim.Offloaded(kind, model.parameters(), **options)
        before = [local(p).clone() for p in model.parameters()]
        model(torch.ones(4, 7, dtype=torch.bfloat16)).sum().backward()
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert all(map(torch.equal, before, map(local, model.parameters())))


def norms_in_backward():
    """Rules that add up norms over ranks are refused in the backward pass."""
    model = sharded(net(torch.float32))
    optimizer = optim.LAMB(model.parameters())
    optim.step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"is sharded, and LAMB needs the whole tensor; expected a rule"):
        model(torch.ones(4, 7)).sum().backward()


def ddp(view):
    """Its gradients are reduced after the hooks of parameters, in place and without a version counter."""
    wrapped = partial(nn.parallel.DistributedDataParallel, gradient_as_bucket_view=view)
    plain, offloaded = wrapped(net()), wrapped(net())
    one = optim.AdamW(plain.parameters(), **SPLIT)
    other = Pretended(Memory(), optim.AdamW, offloaded.parameters(), late=False, **SPLIT)
    assert train(plain, one, micro=2) == train(offloaded, other, micro=2)
    assert_same(plain, offloaded)
    with Traffic(other) as traffic:
        train(offloaded, other, [8])
    assert traffic.down < 3  # no copy before the reduction; 2 and the padding of small tensors


def saved_by_torch():
    model = net()
    optimizer = optim.Offloaded(optim.AdamW, model.parameters(), **SPLIT)
    train(model, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))


def scenarios(folder):
    return {
        "fsdp2": partial(fsdp2, SPLIT),
        "fsdp2-masters": partial(fsdp2, {"lr": 1e-2}),
        "fsdp2-fp32": partial(fsdp2, {"lr": 1e-2}, torch.float32),
        "fsdp2-hooks": fsdp2_copies_in_the_backward_pass,
        "fsdp2-sharded-checkpoints": partial(fsdp2_checkpoints, False),
        "fsdp2-full-checkpoints": partial(fsdp2_checkpoints, True),
        "whole-checkpoint": whole_checkpoint_into_shards,
        "dcp": partial(dcp_saves_and_loads, f"{folder}/saved"),
        "fsdp2-in-backward": fsdp2_in_backward,
        "refusals": refusals,
        "norms-in-backward": norms_in_backward,
        "ddp": partial(ddp, False),
        "ddp-view": partial(ddp, True),
        "torch-save": saved_by_torch,
    }


def run(rank, folder):
    run_scenarios(scenarios(folder), rank, WORLD, Path(folder))


@pytest.fixture(scope="module")
def failures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(run, (str(folder),), WORLD)
    return {path.stem: path.read_text() for path in folder.glob("*.failed on *")}


@pytest.mark.parametrize("name", scenarios(""))
def test_two_ranks(name, failures):
    assert name not in failures, failures[name]
