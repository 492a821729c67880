"""GradScaler(policy="headroom") on two gloo ranks: one scale, from the largest gradient of all ranks.

It goes with the overflow flag in one all-reduce of 16 bytes.
"""

import math
import random
from functools import partial
from unittest import mock

import torch
from fusedamp import GradScaler, numerics, optim
from headroom_model import Model
from ranks import agreed, needs_gloo, rank, spawned
from torch import nn

pytestmark = needs_gloo
WAYS = {
    "step": lambda scaler, optimizer, group: None,
    "unscale": lambda scaler, optimizer, group: scaler.unscale_(optimizer),
    "clip": lambda scaler, optimizer, group: scaler.clip_grad_norm_(optimizer, 1.0, process_group=group),
    "clip twice": lambda scaler, optimizer, group: [
        scaler.clip_grad_norm_(optimizer, 1.0, p, process_group=group) for p in (2.0, math.inf)
    ],
}
MAKERS = {
    "fused": lambda params: optim.AdamW(params, lr=1e-6),
    "torch's": lambda params: torch.optim.AdamW(params, lr=1e-6),
    "torch's fused": lambda params: torch.optim.AdamW(params, lr=1e-6, fused=True),
}


class MaxReductions:
    """Bytes of each all-reduce for a maximum within the block."""

    def __enter__(self):
        self.bytes, reduce = [], torch.distributed.all_reduce

        def counted(tensor, op, group):
            if op == torch.distributed.ReduceOp.MAX and tensor.numel() <= 2:
                self.bytes.append(tensor.numel() * tensor.element_size())
            return reduce(tensor, op=op, group=group)

        self._patch = mock.patch.object(torch.distributed, "all_reduce", counted)
        self._patch.start()
        return self

    def __exit__(self, *_):
        self._patch.stop()


def maxima(steps=120):
    """The largest unscaled gradient of each rank; overflows come from either."""
    rng = random.Random(3)
    for _ in range(steps):
        yield [2.0 ** (rng.gauss(-3, 2) + (rng.random() < 0.03) * 14) for _ in range(2)]


def follow(scaler, optimizers, give, way, bytes_per_step, group=None):
    model = Model(2.0**16, bits=2, interval=50)
    if rank() == 1 or group is None:  # with a group, one rank may have no loss
        scaler.scale(torch.ones(()))
    for step, unscaled in enumerate(maxima()):
        values = [torch.tensor(x * model.scale).item() for x in unscaled]
        values = [x if x < 65520 else math.inf for x in values]
        give(values)
        with MaxReductions() as seen:
            for optimizer in optimizers:
                WAYS[way](scaler, optimizer, group)
                scaler.step(optimizer)
            scaler.update()
        if way != "clip twice":  # by another norm: the gradients are checked again
            assert seen.bytes == bytes_per_step, (step, seen.bytes)
        model.update(math.inf in values, max(values))
        assert agreed(scaler.get_scale()) == model.scale
        assert agreed(scaler._headroom.save())[4:] == list(model.ring)
    assert any(b > -3 for b in model.ring)


def whole():
    return torch.distributed.group.WORLD


def headroom(**options):
    return GradScaler("cpu", policy="headroom", growth_interval=50, **options)


def stages(make, way):
    """Each rank has a parameter of its own."""
    param = nn.Parameter(torch.ones(3 + rank()))

    def give(values):
        param.grad = torch.zeros_like(param)
        param.grad[rank()] = -values[rank()]

    follow(headroom(process_group=whole()), [MAKERS[make]([param])], give, way, [16], whole())


def nothing_here(make):
    """The second rank has a gradient in every other step, the first one always."""
    param, steps = nn.Parameter(torch.ones(3)), iter(range(1000))

    def give(values):
        if next(steps) % 2:
            values[1] = 0.0
        param.grad = None if rank() and not values[1] else torch.full_like(param, values[rank()])

    follow(headroom(process_group=whole()), [MAKERS[make]([param])], give, "step", [16], whole())


def shards(make, way, meshes=1):
    """DTensors need no process group. Optimizers on several meshes agree once more, in the update."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

    params = []
    for i in range(meshes):
        mesh = init_device_mesh("cpu", (2,), mesh_dim_names=(f"dim{i}",))
        params.append(nn.Parameter(distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)])))

    def give(values):
        for i, param in enumerate(params):
            param.grad = torch.zeros_like(param)
            # With two meshes, each rank's largest is in another optimizer.
            if i == rank() % meshes:
                param.grad._local_tensor[1, 1] = values[rank()]

    per_step = [16] * (meshes if meshes == 1 else 2 * meshes)
    follow(headroom(), [MAKERS[make]([param]) for param in params], give, way, per_step)


def default_policy():
    """It reduces the flag of 4 bytes, as ever."""
    param = nn.Parameter(torch.ones(3))
    optimizer, scaler = optim.AdamW([param]), GradScaler("cpu", process_group=whole())
    for _ in range(4):
        param.grad = torch.ones_like(param)
        with MaxReductions() as seen:
            scaler.step(optimizer)
        scaler.update()
        assert seen.bytes == [4]


def activations():
    """They differ over ranks; with a group, the largest of all bounds the scale."""
    layer = nn.Linear(2, 1, bias=False)
    nn.init.ones_(layer.weight)
    optimizer = optim.AdamW(layer.parameters(), lr=1e-6)
    scaler = headroom(init_scale=2.0**14, process_group=whole())
    numerics.watch(optimizer, scaler, updates=False, activations=layer)
    for _ in range(4):
        optimizer.zero_grad()
        x = torch.full((1, 2), 2.0**-12)
        scaler.scale(layer(x).sum() * 2.0 ** (2 + 2 * rank())).backward()
        layer.weight.grad.div_(2.0 ** (2 * rank()))  # as DistributedDataParallel would make them equal
        scaler.step(optimizer)
        scaler.update()
        assert agreed(scaler.get_scale()) == 2.0**9
    assert agreed(scaler._headroom.save())[4:] == [4] * 4


SCENARIOS = {
    f"{kind}, {name}, {way}": partial(run, name, way)
    for name in MAKERS
    for way in WAYS
    for kind, run in {"stages": stages, "shards": shards}.items()
}
SCENARIOS |= {f"nothing here, {name}": partial(nothing_here, name) for name in MAKERS}
SCENARIOS |= {
    "two meshes": partial(shards, "fused", "step", 2),
    "two meshes, unscaled": partial(shards, "torch's", "unscale", 2),
    "default policy": default_policy,
    "activations": activations,
}
ranks, test_on_ranks = spawned({2: SCENARIOS})
