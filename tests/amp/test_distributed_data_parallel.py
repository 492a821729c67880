"""DistributedDataParallel on 2 gloo ranks: GradScaler and AdamW on FP16 weights, against one process.

The loss is sum |x @ w + b - y| of small integers x and y. Each gradient is then a sum of +-x: an integer
below 2048 with its scale, exact in FP16 in any order. So two ranks and one process with the whole batch must
give the same bits, and no tolerance is needed.
"""

import math
from functools import partial

import fusedamp
import torch
from ranks import agreed, needs_gloo, rank, spawned
from torch import nn

pytestmark = needs_gloo
WORLD, ROWS, STEPS, BAD = 2, 16, 8, 3
FORMATS = {
    "FP32 masters": {},
    "split masters": {"master_weights": "split"},
    "split masters, 8-bit states": {"master_weights": "split", "state_dtype": "int8"},
    "stochastic rounding": {"master_weights": "none", "stochastic_rounding": True},
}


def batch(step):
    """At step ``BAD`` the last row overflows FP16 when it is scaled; that row belongs to the last rank."""
    draw = torch.Generator().manual_seed(step)
    x, y = (torch.randint(-2, 3, (ROWS, width), generator=draw).half() for width in (8, 4))
    if step == BAD:
        x[-1] = 6e4
    return x, y


def train(net, parameters, rows, share, **options):
    """Train on ``rows`` of each batch; returns weights, states and scales."""
    optimizer = fusedamp.optim.AdamW(parameters, lr=1e-2, rounding_seed=0, **options)
    scaler = fusedamp.GradScaler("cpu", init_scale=16.0, growth_interval=3)
    scales, skipped, norms = [], [], []
    for step in range(STEPS):
        x, y = (part[rows] for part in batch(step))
        optimizer.zero_grad()
        loss = (net(x).float() - y).abs().sum() / share
        scaler.scale(loss).backward()
        before = [*(p.detach().clone() for p in parameters), *tensors(optimizer)]
        norms.append(scaler.clip_grad_norm_(optimizer, 2.0).item())
        scaler.step(optimizer)
        skipped.append(bool(scaler.last_step_skipped))
        if step == BAD:
            same(before, [*parameters, *tensors(optimizer)])
        scaler.update()
        scales.append(scaler.get_scale())
    assert skipped == [step == BAD for step in range(STEPS)], skipped
    assert all(math.isfinite(norm) == (step != BAD) for step, norm in enumerate(norms)), norms
    assert scales == [16, 16, 32, 16, 16, 16, 32, 32], scales
    return [*(p.detach() for p in parameters), *tensors(optimizer), torch.tensor(scales)]


def tensors(optimizer):
    entries = optimizer.state_dict()["state"].values()
    return [value.clone() for entry in entries for value in entry.values() if isinstance(value, torch.Tensor)]


def same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), (a - b).abs().max()


def model():
    torch.manual_seed(0)
    return nn.Linear(8, 4).half()


def ddp(options=None, **wrapping):
    """All ranks skip what overflows on one of them; they agree with each other and with one process."""
    options = options or {}
    net = model()
    wrapped = nn.parallel.DistributedDataParallel(net, **wrapping)
    share = ROWS // WORLD
    ours = train(wrapped, list(net.parameters()), slice(rank() * share, (rank() + 1) * share), 1, **options)
    alone = model()
    same(ours, train(alone, list(alone.parameters()), slice(None), WORLD, **options))
    agreed([tensor.tolist() for tensor in ours])
    assert not torch.equal(ours[0], model().weight)


SCENARIOS = {name: partial(ddp, options=options) for name, options in FORMATS.items()} | {
    "bucket views": partial(ddp, gradient_as_bucket_view=True),
    "static graph": partial(ddp, static_graph=True),
    "one bucket per parameter": partial(ddp, bucket_cap_mb=1e-6),
}


ranks, test_on_two_ranks = spawned({WORLD: SCENARIOS})
