"""8-bit states of DTensors on 2 and 4 gloo ranks: the bits of one process if shards are whole blocks, blocks
of their own if not; checkpoints go anywhere.
"""

import copy
import io
from functools import partial

import pytest
import torch
from cases import BY_NAME, kept
from fusedamp.optim.state.encoded import Quantized
from ranks import agreed, needs_gloo, rank, spawned

dist = torch.distributed
pytestmark = needs_gloo
OPTIONS = {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3}
# Shards of whole blocks on 2 and 4 ranks, with and without an equal number of rows; by rows and by columns.
ON_TWO_AXES = (1024, 2)  # its columns are sharded over a mesh dimension of one rank
ROWS = [(7, 128), (5, 2, 64), (1, 256), (512,), (1024, 1), ON_TWO_AXES]
COLUMNS = [(3, 512), (4, 1024)]
CUT = [(7, 6), (300,), (5, 100)]  # boundaries cut blocks


def layout(shape):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard

    if shape == ON_TWO_AXES:
        return init_device_mesh("cpu", (1, dist.get_world_size())), [Shard(1), Shard(0)]
    return init_device_mesh("cpu", (dist.get_world_size(),)), [Shard(1 if shape in COLUMNS else 0)]


def gradient(shape, step):
    """Of very different sizes in different rows, so that blocks have scales of their own."""
    generator = torch.Generator().manual_seed(step)
    grad = torch.randn(shape, generator=generator)
    return (grad * torch.rand(shape[0], *[1] * (len(shape) - 1), generator=generator) ** 8).bfloat16()


def made(shapes, sharded=True, case="adamw", **options):
    from torch.distributed.tensor import distribute_tensor

    torch.manual_seed(0)
    values = [torch.randn(shape).bfloat16() for shape in shapes]
    params = [
        torch.nn.Parameter(distribute_tensor(v, *layout(s), src_data_rank=None) if sharded else v)
        for v, s in zip(values, shapes, strict=True)
    ]
    return params, BY_NAME[case].ours(params, **{"lr": 0.01, **BY_NAME[case].options, **OPTIONS, **options})


def train(params, optimizer, steps, skip=()):
    from torch.distributed.tensor import DTensor, distribute_tensor

    for step in steps:
        for p in params:
            grad = gradient(tuple(p.shape), step)
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        optimizer.found_inf = torch.tensor(float(step in skip))
        optimizer.step()


def whole(value):
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def same(params, optimizer, every, expected):
    """Weights, and states as checkpoints hold them, bit for bit."""
    ours, theirs = optimizer.state_dict()["state"], expected.state_dict()["state"]
    for i, (p, q) in enumerate(zip(params, every, strict=True)):
        assert torch.equal(whole(p.detach()), q)
        assert ours[i].keys() - theirs[i].keys() == set()
        for name, value in theirs[i].items():
            if name.endswith("_order"):  # of contiguous tensors
                continue
            got = ours[i][name]
            if isinstance(value, torch.Tensor):
                assert torch.equal(whole(got).reshape(value.shape), value), (i, name)
            else:
                assert got == value, (i, name)


def whole_blocks(case):
    shapes = [*ROWS, *COLUMNS]
    params, optimizer = made(shapes, case=case)
    every, expected = made(shapes, False, case=case)
    for p, o in ((params, optimizer), (every, expected)):
        train(p, o, range(4), skip=(2,))
    same(params, optimizer, every, expected)
    # Its own checkpoint, one process's, and one process from it.
    for (p, o), (q, e), saved in (
        (made(shapes, case=case), (every, expected), optimizer),
        (made(shapes, case=case), (every, expected), expected),
        (made(shapes, False, case=case), (every, expected), optimizer),
    ):
        with torch.no_grad():
            for a, b in zip(p, params if hasattr(p[0], "full_tensor") else every, strict=True):
                a.copy_(b)
        o.load_state_dict(copy.deepcopy(saved.state_dict()))
        same(p, o, q, e)
        again, after = made(shapes, False, case=case)
        with torch.no_grad():
            for a, b in zip(again, every, strict=True):
                a.copy_(b)
        after.load_state_dict(expected.state_dict())
        for x, y in ((p, o), (again, after)):
            train(x, y, [7, 8])
        same(p, o, again, after)


def cut_blocks(case):
    """The error of 8-bit states is about that of one process, and checkpoints hold FP32 values."""
    params, optimizer = made(CUT, case=case)
    every, expected = made(CUT, False, case=case)
    exact, reference = made(CUT, False, case=case, state_dtype="float32")
    for p, o in ((params, optimizer), (every, expected), (exact, reference)):
        train(p, o, range(4))
    for p, q, r in zip(params, every, exact, strict=True):
        error, usual = ((whole(t.detach()) - r).float().norm() for t in (p, q))
        assert error <= 2 * usual + 2**-8 * r.float().norm()
    saved = optimizer.state_dict()
    for i, p in enumerate(params):
        for name in ("exp_avg", "momentum_buffer"):
            if name in saved["state"][i]:
                value = saved["state"][i][name]
                assert value.dtype == torch.float32
                assert torch.equal(whole(value), whole(optimizer.state[p][name] * 1.0))
                assert f"{name}_scale" not in saved["state"][i]
    again, after = made(CUT, case=case)
    with torch.no_grad():
        for a, b in zip(again, params, strict=True):
            a.copy_(b)
    after.load_state_dict(copy.deepcopy(saved))
    for p, o in ((again, after), (params, optimizer)):
        train(p, o, [7])
    for p, q in zip(again, params, strict=True):
        difference = (whole(p.detach()) - whole(q.detach())).float().norm()
        assert difference <= 2**-7 * whole(q.detach()).float().norm()


def live_states():
    """Arithmetic sees numbers, copies stay encoded, and collectives refuse by name."""
    from torch.distributed.tensor import Replicate

    params, optimizer = made([(8, 128)])
    train(params, optimizer, range(2))
    state = optimizer.state[params[0]]["exp_avg"]
    assert state.dtype == torch.float32
    assert isinstance(state._local_tensor, Quantized)
    numbers = state * 2.0
    assert torch.equal(numbers.to_local() / 2, state._local_tensor.dequantize())
    for copied in (copy.deepcopy(state), state.clone()):
        assert torch.equal(copied._local_tensor.bits, state._local_tensor.bits)
    with pytest.raises(TypeError, match="is not supported on an 8-bit state, which is encoded"):
        state.redistribute(placements=[Replicate()])
    dist.barrier()
    # A replaced state is quantized by the next step; so is one that is placed elsewhere.
    before = [t.clone() for t in (state._local_tensor.bits, state._local_tensor.scales)]
    optimizer.state[params[0]]["exp_avg"] = (state * 1.0).redistribute(placements=[Replicate()])
    optimizer.found_inf = torch.ones(())
    train(params, optimizer, [5], skip=(5,))
    again = optimizer.state[params[0]]["exp_avg"]._local_tensor
    assert isinstance(again, Quantized)
    assert again.bits.shape == before[0].shape
    optimizer.state[params[0]].clear()
    train(params, optimizer, [6])
    agreed([whole(p.detach()).tolist() for p in params])


def full_state_dict():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_optimizer_state_dict,
        set_optimizer_state_dict,
    )
    from torch.distributed.fsdp import fully_shard

    def network(sharded):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(128, 6, bias=False), torch.nn.Linear(6, 5)).bfloat16()
        return fully_shard(net) if sharded else net

    net, reference = network(True), network(False)
    ours, expected = (BY_NAME["adamw"].ours(m.parameters(), lr=0.01, **OPTIONS) for m in (net, reference))
    for m, o in ((net, ours), (reference, expected)):
        train(list(m.parameters()), o, range(3))
    full = get_optimizer_state_dict(net, ours, options=StateDictOptions(full_state_dict=True))
    wanted = expected.state_dict()["state"][0]
    got = full["state"]["0.weight"]
    for name in ("exp_avg", "exp_avg_scale", "exp_avg_sq", "exp_avg_sq_scale", "master"):
        assert torch.equal(got[name].reshape(wanted[name].shape), wanted[name]), name
    assert full["state"]["1.weight"]["exp_avg"].dtype == torch.float32
    for broadcast in (False, True):
        other = network(True)
        with torch.no_grad():
            for p, q in zip(other.parameters(), net.parameters(), strict=True):
                p.copy_(q)
        again = BY_NAME["adamw"].ours(other.parameters(), lr=0.01, **OPTIONS)
        how = StateDictOptions(full_state_dict=True, broadcast_from_rank0=broadcast)
        given = copy.deepcopy(full) if rank() == 0 or not broadcast else {}
        set_optimizer_state_dict(other, again, given, options=how)
        first, second = (next(iter(m.parameters())) for m in (other, net))
        for name, value in kept(ours.state[second]).items():
            found = kept(again.state[first])[name]
            for a, b in zip(parts(found), parts(value), strict=True):
                assert torch.equal(a, b), name


def parts(value):
    inner = getattr(value, "_local_tensor", value)
    return [inner.bits, inner.scales] if isinstance(inner, Quantized) else [inner]


def saved_to_a_file():
    params, optimizer = made([*ROWS, *CUT])
    train(params, optimizer, range(2))
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    again, after = made([*ROWS, *CUT])
    with torch.no_grad():
        for a, b in zip(again, params, strict=True):
            a.copy_(b)
    after.load_state_dict(torch.load(file, weights_only=False))
    for p, q in zip(again[: len(ROWS)], params[: len(ROWS)], strict=True):
        for name, value in kept(optimizer.state[q]).items():
            for a, b in zip(parts(kept(after.state[p])[name]), parts(value), strict=True):
                assert torch.equal(a, b), name
    copied = copy.deepcopy(optimizer)
    train(copied.param_groups[0]["params"], copied, [4])


SCENARIOS = {
    2: {f"whole blocks, {case}": partial(whole_blocks, case) for case in ("adamw", "sgd-nesterov", "lamb")}
    | {f"cut blocks, {case}": partial(cut_blocks, case) for case in ("adamw", "sgd-nesterov")}
    | {"live states": live_states, "full state dict": full_state_dict, "file": saved_to_a_file},
    4: {"whole blocks": partial(whole_blocks, "adamw"), "cut blocks": partial(cut_blocks, "adamw")}
    | {"full state dict": full_state_dict},
}
ranks, test_on_ranks = spawned(SCENARIOS)
