"""A watch on two ranks: records are of a rank's shards, and together they are those of one process."""

import counted
import torch
from fusedamp import GradScaler, numerics, optim
from ranks import agreed, needs_gloo, spawned
from sharded_net import network, sharded

pytestmark = needs_gloo
BAD, STEPS = 3, 6


def trained(net):
    """Train with whole gradients that depend on the step; return the records and the gradients."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    optimizer = optim.AdamW(net.parameters(), lr=1e-2)
    scaler = GradScaler("cpu", init_scale=16.0)
    watch = numerics.watch(optimizer, scaler, every=1, model=net)
    scaler.scale(torch.ones(()))
    grads = []
    for step in range(1, STEPS + 1):
        generator = torch.Generator().manual_seed(step)
        grads.append([])
        for p in net.parameters():
            grad = (torch.randn(p.shape, generator=generator) * scaler.get_scale()).to(p.dtype)
            if step == BAD and grad.dim() == 2:
                grad[-1, -1] = torch.inf
            grads[-1].append(grad.clone())
            if isinstance(p, DTensor):
                grad = distribute_tensor(grad, p.device_mesh, p.placements, src_data_rank=None)
            p.grad = grad
        scaler.step(optimizer)
        scaler.update()
    return watch.poll(), grads


def watched_shards():
    ours, grads = trained(sharded())
    theirs, _ = trained(network())
    names = [name for name, _ in network().named_parameters()]
    agreed([record.skipped for record in ours])
    for record, one, step in zip(ours, theirs, grads, strict=True):
        assert (record.step, record.scale, record.skipped) == (one.step, one.scale, one.skipped)
        assert record.skipped == (record.step == BAD)
        everyone = [None] * 2
        torch.distributed.all_gather_object(everyone, record)
        for i, (name, grad) in enumerate(zip(names, step, strict=True)):
            rows = [(r, r.names.index(name)) for r in everyone if name in r.names]
            assert torch.equal(sum(r.histogram[at] for r, at in rows), counted.histogram(grad))
            assert max(r.largest[at].item() for r, at in rows) == one.largest[i].item()
            if record.skipped:
                continue
            for column in ("moved", "lost"):
                assert sum(getattr(r, column)[at].item() for r, at in rows) == getattr(one, column)[i].item()


ranks, test_on_ranks = spawned({2: {"watched_shards": watched_shards}})
