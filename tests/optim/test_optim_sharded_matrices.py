"""Muon and Adafactor on DTensors, on 2 and 4 gloo ranks: as one process with whole tensors, replicas alike.

Sizes that no number of ranks divides, matrices of one row, whose shards are mostly empty, and each layout in
which FSDP2, HSDP and tensor parallelism place weights. The reference is the same optimizer on plain tensors.
"""

import copy
import itertools
import math
from functools import partial

import fusedamp
import pytest
import torch
import torch.multiprocessing as mp
from cases import bits, kept, set_grads
from fusedamp import optim
from ranks import needs_gloo, run_scenarios
from sharded_worlds import (
    FORMATS,
    KINDS,
    SHAPES,
    Traffic,
    World,
    everything,
    layouts,
    local,
    mesh_of,
    placed,
    whole,
)
from torch import nn

dist = torch.distributed
pytestmark = needs_gloo


def as_whole_tensors(kind, layout):
    for form in FORMATS:
        World(kind, layout, form).train(range(5))


def one_bad_shard(kind, layout):
    """An infinity in the shard of one rank: nothing changes anywhere, and all ranks lower the scale."""
    world, scaler = World(kind, layout, "bf16"), fusedamp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(torch.ones(()))
    for seed in range(4):
        world.set_grads(seed)
        bad = seed == 2
        if not bad:
            world.expected.step()
        for p in world.params:
            p.grad = p.grad * scaler.get_scale()
        if bad and dist.get_rank() == dist.get_world_size() - 1:
            local(world.params[0].grad)[-1, -1] = math.inf
        before = everything(world)
        scaler.step(world.optimizer)
        scaler.update()
        assert (everything(world) == before) == bad
        assert scaler.last_step_skipped.item() == bad
        assert scaler.get_scale() == (4.0 if seed < 2 else 2.0)
        world.compare()


def missing_gradients(kind):
    """Without a gradient on one rank: as zeros. On all ranks: unchanged. Frozen: ignored."""
    world = World(kind, "rows")
    world.params[8].requires_grad_(False)
    for seed in range(3):
        world.set_grads(seed)
        world.whole[8].grad = world.params[8].grad = None
        if seed == 1:
            world.whole[0].grad[: -(-5 // dist.get_world_size())] = 0
            world.whole[2].grad = world.params[2].grad = None
            if dist.get_rank() == 0:
                world.params[0].grad = None
        world.expected.step()
        world.optimizer.step()
        assert world.params[8] not in world.optimizer.state
    del world.params[8], world.whole[8]
    world.compare()
    world.optimizer.zero_grad()
    before = everything(world)
    world.optimizer.step()
    assert everything(world) == before


def rank_without_gradients(kind):
    """A rank without any gradient takes part all the same, in a scaler's step too."""
    world, scaler = World(kind, "rows", shapes=[(9, 4), (6, 10)]), fusedamp.GradScaler("cpu", init_scale=1.0)
    scaler.scale(torch.ones(()))
    for seed in range(3):
        world.set_grads(seed)
        for p in world.whole:
            p.grad[: -(-p.size(0) // dist.get_world_size())] = 0
        if dist.get_rank() == 0:
            world.optimizer.zero_grad()
        world.expected.step()
        scaler.step(world.optimizer)
        scaler.update()
    world.compare()


def resumed(kind, layout):
    """A state dict, of shards or gathered, continues with the same bits in another optimizer."""
    world = World(kind, layout, "bf16")
    world.train(range(2))
    sharded = copy.deepcopy(world.optimizer.state_dict())
    entries = {i: {k: whole(v) for k, v in entry.items()} for i, entry in sharded["state"].items()}
    gathered, others = {**sharded, "state": entries}, []
    for saved in (sharded, gathered):
        other = World(kind, layout, "bf16", mesh=world.mesh)
        for i, p in enumerate(other.params):
            local(p).data.copy_(local(world.params[i]))
            other.whole[i].data.copy_(whole(p))
        other.optimizer.load_state_dict(saved)
        other.expected.load_state_dict(gathered)
        others.append(other)
    for one in (world, *others):
        one.train(range(2, 4))
        assert everything(one) == everything(world)


def estimated(kind, layout):
    """An estimate counts the bytes of this rank."""
    world = World(kind, layout, "bf16")
    world.train(range(1))
    row = fusedamp.estimate(world.params, world.optimizer).rows[0]
    entries = [kept(entry) for entry in world.optimizer.state.values()]
    assert row.masters == sum(local(entry.pop("master")).nbytes for entry in entries)
    assert row.states == sum(local(value).nbytes for entry in entries for value in entry.values())


def traffic(layout, replicas):
    """Muon: 4 bytes per element there and 2 back, to other ranks. Adafactor: sums, of all tensors at once."""
    ranks = dist.get_world_size() // replicas
    shapes = [(8, 12)] * ranks + [(4, 8)] * ranks + [(8,)] * 3
    for kind in KINDS:
        world = World(kind, layout, "bf16", shapes)
        world.set_grads(0)
        with Traffic() as seen:
            world.optimizer.step()
        if kind == "muon":
            elements = sum(math.prod(shape) for shape in shapes if len(shape) == 2)
            assert seen.sent == 6 * elements * (ranks - 1) // ranks**2
            assert seen.reduced == [8 * 2 * ranks]  # whether there is a gradient
        else:
            # Gradients; norms of weights and sums along columns; sums of the means of rows; norms of updates.
            n = len(shapes)
            assert seen.reduced == [8 * n, 8 * (n + ranks * (12 + 8)), 8 * 2 * ranks, 8 * n]
            assert seen.sent == 0


def each_product_once(layout, replicas):
    """No rank multiplies what another one does: at most one matrix per round, of similar cost."""
    from fusedamp.optim import muon

    made, before = [], muon.orthogonalized
    world = World("muon", layout)
    world.set_grads(0)
    muon.orthogonalized = lambda matrix, *options: (
        made.append(tuple(matrix.shape)) or before(matrix, *options)
    )
    try:
        world.optimizer.step()
    finally:
        muon.orthogonalized = before
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, made)
    matrices = sorted([shape for shape in SHAPES if len(shape) == 2] * replicas)
    assert sorted(shape for some in everyone for shape in some) == matrices
    most = -(-len(matrices) // dist.get_world_size())
    assert max(map(len, everyone)) == most
    assert {some[0] for some in everyone if some} <= {(6, 10), (5, 7), (9, 4), (3, 11)}  # the first round


def one_shard_each(placements, shape, cut):
    """``per_shard``: as if each shard of tensor parallelism were a parameter of its own."""
    mesh = mesh_of(shape)
    values = [torch.randn(8, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    params = [nn.Parameter(placed(value, mesh, placements)) for value in values]
    parts = [[nn.Parameter(part.clone()) for part in value.chunk(2, cut)] for value in values]
    make = partial(KINDS["muon"], adjust_lr_fn=None)
    optimizer, expected = (
        make(params, per_shard=mesh.mesh_dim_names[-1]),
        make([part for some in parts for part in some]),
    )
    for seed in range(4):
        generator = torch.Generator().manual_seed(100 + seed)
        for p, some in zip(params, parts, strict=True):
            grad = torch.randn(8, 12, generator=generator)
            p.grad = placed(grad, mesh, placements)
            for part, piece in zip(some, grad.chunk(2, cut), strict=True):
                part.grad = piece.clone()
        with Traffic() as seen:
            optimizer.step()
        assert (seen.sent > 0) == (len(shape) == 2)
        expected.step()
        for p, some in zip(params, parts, strict=True):
            assert bits(p.full_tensor()) == bits(torch.cat(some, cut))


def refusals():
    """Errors of all ranks before anything moves."""
    from torch.distributed.tensor import DTensor, Partial, Shard

    mesh, rank = mesh_of((2,)), dist.get_rank()
    uneven = DTensor.from_local(
        torch.ones(3 if rank else 1, 5), mesh, [Shard(0)], run_check=False, shape=(4, 5), stride=(5, 1)
    )
    summands = DTensor.from_local(torch.ones(4, 5), mesh, [Partial()], run_check=False)
    good = placed(torch.ones(4, 5), mesh, [Shard(0)])
    wrong = [
        (
            kind,
            summands,
            {},
            r"params\[0\] of shape \[4, 5\] is a DTensor with placements .*Partial.* expected Sh",
        )
        for kind in KINDS
    ] + [
        (
            "muon",
            uneven,
            {},
            rf"of shape \[4, 5\] has a shard of shape \[{3 if rank else 1}, 5\]; expected \[2, 5",
        ),
        (
            "muon",
            good,
            {"per_shard": "rows"},
            r"group 0: per_shard is 'rows'; expected a dim.* which have \['tp\d+'\]",
        ),
    ]
    for kind, value, options, message in wrong:
        param = nn.Parameter(value)
        param.grad = torch.ones_like(value)
        before = bits(local(param))
        with pytest.raises(ValueError, match=message):
            KINDS[kind]([param], **options).step()
        assert bits(local(param)) == before
    with pytest.raises(
        (ValueError, TypeError), match=r"per_shard is 1; expected the name of a mesh dimension"
    ):
        optim.Muon([nn.Parameter(good)], per_shard=1)


def sub_meshes(kind):
    """Parameters on the whole mesh, along either dimension, and plain ones, in one optimizer."""
    from torch.distributed.tensor import Shard

    mesh = mesh_of((2, 2))
    world = World(kind, "rows")
    first, second = (mesh[name] for name in mesh.mesh_dim_names)
    places = [(mesh, [Shard(0), Shard(1)]), (first, [Shard(0)]), (second, [Shard(1)]), (mesh, None)]
    world.place = [
        partial(placed, mesh=m, placements=p)
        for _, (m, p) in zip(SHAPES, itertools.cycle(places), strict=False)
    ]
    world.params = [nn.Parameter(world.place[i](p.detach())) for i, p in enumerate(world.whole)]
    world.optimizer = KINDS[kind](world.params)
    world.expected = KINDS[kind](world.whole)
    world.train(range(4))


def real_modules(kind):
    """Weights that torch's own tensor parallelism and fully_shard have placed, also unevenly."""
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    torch.manual_seed(0)
    mesh = mesh_of((2, 2))
    plain = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 6), nn.Linear(6, 3))
    model = copy.deepcopy(plain)
    data, tensor = (mesh[name] for name in mesh.mesh_dim_names)
    parallelize_module(model, tensor, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for module in (*model, model):
        fully_shard(module, mesh=data)
    world = World(kind, "rows")
    world.whole, world.params = list(plain.parameters()), list(model.parameters())
    world.place = [partial(placed, mesh=p.device_mesh, placements=p.placements) for p in world.params]
    world.optimizer, world.expected = KINDS[kind](world.params), KINDS[kind](world.whole)
    world.train(range(4))


def checkpointed(kind, layout, folder, saves):
    """A distributed checkpoint that 4 ranks save and 2 load."""
    from torch.distributed import checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as states

    world = World(kind, layout, "bf16")
    model = nn.ParameterList(world.params)
    if saves:
        world.train(range(3))
    saved = {
        "model": model.state_dict(),
        "optimizer": states.get_optimizer_state_dict(model, world.optimizer),
    }
    if saves:
        dcp.save(saved, checkpoint_id=folder)
        return
    dcp.load(saved, checkpoint_id=folder)
    model.load_state_dict(saved["model"])
    states.set_optimizer_state_dict(model, world.optimizer, saved["optimizer"])
    for seed in range(3):
        set_grads(world.whole, seed)
        world.expected.step()
    world.compare()
    world.train(range(3, 5))


def scenarios(world, folder):
    calls = {}
    for kind in KINDS:
        for layout in layouts(world):
            calls[f"{kind}, {layout}"] = partial(as_whole_tensors, kind, layout)
        last = [*layouts(world)][-1] if world == 2 else "fsdp and tp"
        calls[f"{kind}, one bad shard"] = partial(one_bad_shard, kind, last)
        calls[f"{kind}, resumed"] = partial(resumed, kind, last)
        calls[f"{kind}, estimated"] = partial(estimated, kind, last)
        calls[f"{kind}, missing gradients"] = partial(missing_gradients, kind)
        calls[f"{kind}, a rank without gradients"] = partial(rank_without_gradients, kind)
        if world == 4:
            calls[f"{kind}, sub-meshes"] = partial(sub_meshes, kind)
            calls[f"{kind}, real modules"] = partial(real_modules, kind)
            calls[f"{kind}, saved"] = partial(checkpointed, kind, last, folder / f"{kind}.dcp", True)
    calls["traffic"] = partial(traffic, "rows", 1)
    calls["each product once"] = partial(each_product_once, "rows", 1)
    if world == 4:
        from torch.distributed.tensor import Shard
        from torch.distributed.tensor.placement_types import _StridedShard

        calls["traffic of replicas"] = partial(traffic, "hsdp", 2)
        calls["each product once per replica"] = partial(each_product_once, "hsdp", 2)
        strided = (_StridedShard(0, split_factor=2), Shard(0))
        calls["per shard of rows"] = partial(one_shard_each, strided, (2, 2), 0)
        calls["per shard of columns"] = partial(one_shard_each, (Shard(0), Shard(1)), (2, 2), 1)
    else:
        from torch.distributed.tensor import Shard

        calls["per shard"] = partial(one_shard_each, (Shard(1),), (2,), 1)
        calls["refusals"] = refusals
    return calls


def run_all(rank, world, folder):
    run_scenarios(scenarios(world, folder), rank, world, folder)


def load(rank, folder, results):
    calls = {
        f"{kind} loaded, {layout}": partial(checkpointed, kind, layout, folder / f"{kind}.dcp", False)
        for kind in KINDS
        for layout in layouts(2)
    }
    run_scenarios(calls, rank, 2, results)


def spawned(call, world, folder, *more):
    mp.spawn(call, (*more, folder), nprocs=world)
    failures = [f"{path.name}: {path.read_text()}" for path in sorted(folder.glob("*.failed*"))]
    assert not failures, "\n".join(failures)


def test_on_two_ranks(tmp_path):
    spawned(run_all, 2, tmp_path, 2)


@pytest.mark.slow
def test_on_four_ranks_and_checkpoints_on_two(tmp_path):
    spawned(run_all, 4, tmp_path, 4)
    results = tmp_path / "loaded"
    results.mkdir()
    spawned(load, 2, results, tmp_path)
