"""DTensor gradients on a 2-process gloo group: every rank decides alike, whatever it holds itself.

torch's own handler reduces found_inf over the placements of the first gradient only, so that ranks diverge;
custom ops get no handler at all.
"""

import math
from functools import partial

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from ranks import agreed, rank, spawned

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="needs torch.distributed with gloo",
)
WORLD = 2


def mesh_and_placements():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    return init_device_mesh("cpu", (WORLD,)), Replicate(), Shard(0)


def sharded(full, mesh, placement):
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(full, mesh, [placement])


def mixed_world(cls, dtype=torch.float32):
    """A replicated, a sharded and a plain parameter, in the order that misleads torch's handler."""
    mesh, replicate, shard = mesh_and_placements()
    full = [torch.ones(4, 2, dtype=dtype), torch.ones(6, 2, dtype=dtype), torch.ones(3, dtype=dtype)]
    params = [sharded(full[0], mesh, replicate), sharded(full[1], mesh, shard), full[2]]
    params = [p.detach().requires_grad_() for p in params]
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(()))
    return params, cls(params, lr=0.1), scaler, (mesh, replicate, shard)


def fill(params, mesh, replicate, shard, value=8.0):
    for param, placement in zip(params[:2], (replicate, shard), strict=True):
        param.grad = sharded(torch.full(param.shape, value, dtype=param.dtype), mesh, placement)
    params[2].grad = torch.full((3,), value, dtype=params[2].dtype)


def one_bad_shard(cls, unscale_first):
    """One bad shard stops every rank, and the step after it is a good one for all."""
    params, optimizer, scaler, layout = mixed_world(cls)
    fill(params, *layout)
    if rank() == 1:
        params[1].grad._local_tensor[0, 0] = math.inf  # rank 0 sees only finite gradients
    if unscale_first:
        scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert agreed(scaler.last_step_skipped.item())
    scaler.update()
    assert agreed(scaler.get_scale()) == 4.0
    for param in params:
        assert (getattr(param, "_local_tensor", param) == 1).all()
    fill(params, *layout, value=4.0)
    scaler.step(optimizer)
    assert not agreed(scaler.last_step_skipped.item())
    for param in params:
        assert (getattr(param, "_local_tensor", param) < 1).all()


def rank_without_gradients(cls):
    """A rank without gradients joins the reductions; otherwise the others would wait for it."""
    params, optimizer, scaler, layout = mixed_world(cls)
    fill(params, *layout, value=math.nan)
    if rank() == 0:
        for param in params:
            param.grad = None
    assert math.isnan(scaler.clip_grad_norm_(optimizer, 1.0).item())
    scaler.step(optimizer)
    assert agreed(scaler.last_step_skipped.item())
    scaler.update()
    assert agreed(scaler.get_scale()) == 4.0


def norms(deferred):
    """Replicated and plain gradients must not be added over ranks, sharded ones must."""
    for norm_type in (1.0, 2.0, math.inf):
        params, optimizer, scaler, (mesh, replicate, shard) = mixed_world(optim.SGD, torch.float64)
        generator = torch.Generator().manual_seed(0)
        full = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in params]
        expected = torch.cat([g.flatten() for g in full]).norm(norm_type).item()
        params[0].grad = sharded(full[0].clone(), mesh, replicate)
        params[1].grad = sharded(full[1].clone(), mesh, shard)
        params[2].grad = full[2].clone()
        if deferred:
            scaler.update(1.0)
            norm = scaler.clip_grad_norm_(optimizer, expected / 2, norm_type)
            scaler.unscale_(optimizer)
        else:
            norm = fusedamp.clip_grad_norm_(params, expected / 2, norm_type)
        assert norm.item() == pytest.approx(expected, rel=1e-12)
        for param, grad in zip(params, full, strict=True):
            got = param.grad.full_tensor() if hasattr(param.grad, "full_tensor") else param.grad
            torch.testing.assert_close(got, grad / 2, rtol=1e-5, atol=0)


def partial_gradient():
    """Each rank has a summand of the gradient: they are summed before anything reads them."""
    from torch.distributed.tensor import DTensor, Partial

    params, optimizer, scaler, (mesh, replicate, shard) = mixed_world(optim.SGD)
    fill(params, mesh, replicate, shard)
    params[0].grad = DTensor.from_local(torch.full((4, 2), 4.0), mesh, [Partial()], run_check=False)
    # The true gradient is 8 / 8, the sum of both summands, so every one of the 8 + 12 + 3 elements is 1.
    assert scaler.clip_grad_norm_(optimizer, math.inf).item() == pytest.approx(math.sqrt(23))
    scaler.step(optimizer)
    torch.testing.assert_close(params[0].to_local(), torch.full((4, 2), 0.9))


def two_optimizers():
    """One optimizer is sharded, the other's flag is each rank's own: the scale must not diverge."""
    params, _, scaler, layout = mixed_world(optim.SGD)
    fill(params, *layout)
    first, second = optim.SGD(params[:2], lr=0.1), optim.SGD(params[2:], lr=0.1)
    if rank() == 1:
        params[2].grad[0] = math.inf
    scaler.step(first)
    scaler.step(second)
    scaler.update()
    assert agreed(scaler.get_scale()) == 4.0


def sharded_grad_scaler():
    """FSDP1's ShardedGradScaler over ours: stock, it steps on one rank and skips on the other (defect 1)."""
    from torch.distributed.fsdp.sharded_grad_scaler import ShardedGradScaler

    class Scaler(ShardedGradScaler, GradScaler):
        pass

    scaler = Scaler("cpu", init_scale=8.0, process_group=torch.distributed.group.WORLD)
    scaler.scale(torch.ones(()))
    param = torch.ones(3, requires_grad=True)
    optimizer = optim.AdamW([param], lr=0.1)
    param.grad = torch.full((3,), math.inf if rank() else 8.0)
    scaler.step(optimizer)
    assert torch.equal(param, torch.ones(3))
    scaler.update()
    assert agreed(scaler.get_scale()) == 4.0


SCENARIOS = {
    "one bad shard, fused": (one_bad_shard, {"cls": optim.AdamW, "unscale_first": False}),
    "one bad shard, fused after unscale_": (one_bad_shard, {"cls": optim.AdamW, "unscale_first": True}),
    "one bad shard, torch's optimizer": (one_bad_shard, {"cls": torch.optim.SGD, "unscale_first": False}),
    "a rank without gradients, fused": (rank_without_gradients, {"cls": optim.AdamW}),
    "a rank without gradients, torch's optimizer": (rank_without_gradients, {"cls": torch.optim.SGD}),
    "norms at once": (norms, {"deferred": False}),
    "norms of the fused step": (norms, {"deferred": True}),
    "a partial gradient": (partial_gradient, {}),
    "two optimizers on different meshes": (two_optimizers, {}),
    "under ShardedGradScaler": (sharded_grad_scaler, {}),
}


ranks, test_on_two_ranks = spawned(
    {WORLD: {name: partial(body, **options) for name, (body, options) in SCENARIOS.items()}}
)
