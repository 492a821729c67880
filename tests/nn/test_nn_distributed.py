"""fusedamp.nn on 2 gloo ranks: DDP (bucket views, no_sync, static graph) and FSDP2 reduce FP32 gradients.

Guards: gradients that skip the reduction or are counted twice, sums rounded before it, refusals without a
name.
"""

import copy
import itertools
from functools import partial

import fusedamp
import pytest
import torch
from ranks import needs_gloo, rank, spawned
from torch import nn

pytestmark = needs_gloo
WORLD = 2


def model():
    """Two layers, all weights 1: gradients are counts of rows."""
    net = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    for p in net.parameters():
        nn.init.ones_(p)
    nn.init.zeros_(net[0].bias)
    nn.init.zeros_(net[1].bias)
    return fusedamp.nn.convert(net)


def backward(net, rows):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net(torch.ones(rows, 1))
    y.sum().backward()


def full(grad):
    return grad.full_tensor() if hasattr(grad, "full_tensor") else grad


def grads(net):
    return [full(p.grad).flatten().tolist() for p in net.parameters()]


def ddp(**options):
    """3 passes: the first two without reduction, of 257 and 256 rows; ranks differ by 2 rows in the last."""
    net = nn.parallel.DistributedDataParallel(model(), **options)
    for step in range(2):
        with net.no_sync():
            backward(net, 257)
            backward(net, 256)
        backward(net, 1 + 2 * rank())
        wanted = [[515.0]] * 4  # 257 + 256 + mean(1, 3)
        assert grads(net) == wanted, (step, grads(net))
        net.zero_grad(set_to_none=bool(step))


def ddp_static_and_unused():
    net = nn.parallel.DistributedDataParallel(model(), find_unused_parameters=True)
    for _ in range(2):
        net.zero_grad()
        backward(net, 257)
        assert grads(net) == [[257.0]] * 4
    net = nn.parallel.DistributedDataParallel(model(), static_graph=True)
    for _ in range(3):
        net.zero_grad(set_to_none=False)
        backward(net, 257)
        assert grads(net) == [[257.0]] * 4


def ddp_training():
    """Same weights as one process with the whole batch, with scaler and clipping."""
    torch.manual_seed(0)
    start = fusedamp.nn.convert(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1)))
    data = torch.randint(-2, 3, (8, 4)).float()
    results = []
    for distributed in (True, False):
        net = copy.deepcopy(start)
        wrapped = nn.parallel.DistributedDataParallel(net) if distributed else net
        optimizer = fusedamp.optim.AdamW(net.parameters(), lr=1e-2)
        scaler = fusedamp.GradScaler("cpu", init_scale=2.0**4)
        mine = data[rank() :: 2] if distributed else data
        for _ in range(3):
            optimizer.zero_grad()
            for part in mine.chunk(2):
                with torch.autocast("cpu", dtype=torch.float16):
                    loss = wrapped(part).float().square().mean() / 2
                scaler.scale(loss).backward()
            scaler.clip_grad_norm_(optimizer, 1.0)
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def fsdp2(reshard=True, half=False):
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    net = model()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options = {"mp_policy": policy} if half else {}
    for module in net:
        fully_shard(module, reshard_after_forward=reshard, **options)
    fully_shard(net, reshard_after_forward=reshard, **options)
    for step in range(2):
        net.set_requires_gradient_sync(False)
        for rows in (257, 256):
            backward(net, rows) if not half else net(torch.ones(rows, 1)).sum().backward()
        net.set_requires_gradient_sync(True)
        rows = 1 + 2 * rank()
        backward(net, rows) if not half else net(torch.ones(rows, 1)).sum().backward()
        if half:  # products and their gradients in BF16, as torch's: 257 and 513 do not exist
            assert all(abs(g[0] - 515.0) <= 4 for g in grads(net)), grads(net)
        else:
            assert grads(net) == [[515.0]] * 4, (step, grads(net))
        net.zero_grad()


def fsdp2_with_float32_gradients_of_16_bit_weights():
    """FSDP2 drops grad_dtype (torch 2.11 to 2.14): 16-bit gradients, as documented; sharded weights are
    refused."""
    from torch.distributed.fsdp import fully_shard

    net = fusedamp.nn.convert(model().bfloat16(), grad_dtype=torch.float32)
    fully_shard(net)
    for _ in range(2):
        net(torch.ones(3, 1).bfloat16()).sum().backward()
    assert grads(net) == [[6.0]] * 4, grads(net)
    net = fully_shard(model().bfloat16())
    with pytest.raises(
        RuntimeError, match=r"\[convert\] weight is a DTensor; expected a plain tensor, as grad_"
    ):
        fusedamp.nn.convert(net, grad_dtype=torch.float32)


def ddp_with_float32_gradients_of_16_bit_weights():
    """torch's DDP refuses them (torch 2.11 to 2.14)."""
    net = nn.parallel.DistributedDataParallel(
        fusedamp.nn.convert(model().bfloat16(), grad_dtype=torch.float32)
    )
    with pytest.raises(RuntimeError, match="Expected BFloat16, got Float"):
        net(torch.ones(3, 1).bfloat16()).sum().backward()


def tensor_parallel():
    """Weights become DTensors: torch's own products."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    net = fusedamp.nn.convert(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4)))
    for p in net.parameters():
        nn.init.ones_(p)
    plain = copy.deepcopy(net)
    parallelize_module(
        net, init_device_mesh("cpu", (WORLD,)), {"0": ColwiseParallel(), "1": RowwiseParallel()}
    )
    x = torch.ones(3, 4)
    for m in (net, plain):
        m(x).sum().backward()
    for p, q in zip(net.parameters(), plain.parameters(), strict=True):
        assert torch.equal(full(p.grad), q.grad)


VIEWS = {
    f"ddp-{view}-{bucket}": partial(ddp, gradient_as_bucket_view=view, bucket_cap_mb=bucket)
    for view, bucket in itertools.product((False, True), (25, 1e-6))
}
SCENARIOS = VIEWS | {
    "ddp-static": ddp_static_and_unused,
    "ddp-training": ddp_training,
    "ddp-16-bit": ddp_with_float32_gradients_of_16_bit_weights,
    "fsdp2": fsdp2,
    "fsdp2-kept": partial(fsdp2, reshard=False),
    "fsdp2-half": partial(fsdp2, half=True),
    "fsdp2-16-bit": fsdp2_with_float32_gradients_of_16_bit_weights,
    "tensor-parallel": tensor_parallel,
}
ranks, test_two_ranks = spawned({WORLD: SCENARIOS})
