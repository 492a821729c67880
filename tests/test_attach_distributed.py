"""The read pass in backward under DDP and FSDP2 on real gloo groups: what is reduced after the hooks is read
again.

The hook of a parameter runs before DDP reduces its bucket. Where gradients are views of buckets and a
communication hook reduces them, no version counter moves.
"""

import math
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from fusedamp import GradScaler, optim
from ranks import run_scenarios

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
ITERATIONS = [(1.0, 2.0), (1.0, math.inf), (math.nan, 1.0), (3.0, 1.0)]  # a factor of the loss for each rank


def train(model, inner, rank, attached, set_to_none, backwards=None, reduce=lambda inner: None):
    """What is seen and left of a training; one pair of factors for each iteration."""
    optimizer = optim.AdamW(inner.parameters(), lr=0.1)
    scaler = GradScaler("cpu", init_scale=8.0)
    if attached:
        scaler.attach(optimizer, min_numel=0)
    seen = []
    for factors in ITERATIONS:
        optimizer.zero_grad(set_to_none=set_to_none)
        if backwards is not None:
            backwards(model, scaler)
        scaler.scale(model(torch.full((2, 4), 1.0 + rank)).sum() * factors[rank]).backward()
        reduce(inner)
        norm = scaler.clip_grad_norm_(optimizer, 0.5)
        scaler.step(optimizer)
        seen.append((norm.nan_to_num(nan=-1.0).item(), scaler.last_step_skipped.item()))
        scaler.update()
    return seen, [getattr(p, "_local_tensor", p).tolist() for p in inner.parameters()]


def accumulate(model, scaler):
    with model.no_sync():
        scaler.scale(model(torch.ones(1, 4)).square().sum()).backward()


def ddp(rank, bucket_views, comm_hook, set_to_none, no_sync):
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
    from torch.nn.parallel import DistributedDataParallel

    results = []
    for attached in (True, False):
        torch.manual_seed(0)
        inner = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
        model = DistributedDataParallel(inner, gradient_as_bucket_view=bucket_views)
        if comm_hook:
            model.register_comm_hook(None, allreduce_hook)
        results.append(train(model, inner, rank, attached, set_to_none, accumulate if no_sync else None))
    check(*results)


def check(attached, plain):
    """The same with and without, on all ranks; a bad gradient of one rank is everybody's."""
    assert attached == plain
    ranks = torch.distributed.get_world_size()
    everyone = [None] * ranks
    torch.distributed.all_gather_object(everyone, attached)
    assert all(other == everyone[0] for other in everyone), "ranks drifted apart"
    skips = [skipped for _, skipped in attached[0]]
    assert skips == [not all(map(math.isfinite, factors[:ranks])) for factors in ITERATIONS]


def by_hand(rank):
    """The gradients are averaged after backward by a collective of the user's."""
    results = []
    for attached in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 3)
        results.append(train(model, model, rank, attached, True, reduce=all_reduce))
    check(*results)


def all_reduce(model):
    for param in model.parameters():
        torch.distributed.all_reduce(param.grad)


def fsdp2(rank):
    from torch.distributed.fsdp import fully_shard

    results = []
    for attached in (True, False):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        for module in (*model, model):
            fully_shard(module)
        results.append(train(model, model, rank, attached, True))
    assert results[0] == results[1]


SCENARIOS = {
    "DDP": (ddp, (False, False, True, False)),
    "DDP, bucket views": (ddp, (True, False, False, False)),
    "DDP, bucket views, communication hook": (ddp, (True, True, False, False)),
    "DDP, no_sync": (ddp, (False, False, True, True)),
    "DDP, no_sync, bucket views, communication hook": (ddp, (True, True, False, True)),
    "by hand": (by_hand, ()),
    "FSDP2": (fsdp2, ()),
}


def run_all(rank, world, folder):
    calls = {name: partial(body, rank, *options) for name, (body, options) in SCENARIOS.items()}
    run_scenarios(calls, rank, world, folder)


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def folder(request, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("ranks"))
    mp.spawn(run_all, (request.param, path), nprocs=request.param)
    return path


@pytest.mark.parametrize("name", SCENARIOS)
def test_as_without(name, folder):
    failures = [path.read_text() for path in sorted(folder.glob(f"{name}.failed*"))]
    assert not failures, "\n".join(failures)
