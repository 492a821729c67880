"""GradScaler and clip_grad_norm_ with a process group, on 2 and 4 gloo ranks: ranks that hold different
parameters, or replicas that disagree, skip together, keep one scale and clip by one norm.

Without the group, each rank of a pipeline, of FSDP1 or of plain shards decides for itself, and ranks diverge.
"""

import copy
import math
import pickle
from functools import partial

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from ranks import agreed, needs_gloo, rank, spawned
from torch import nn

pytestmark = needs_gloo
SIZES = [(7, 5), (3,), (1, 9), (4, 4)]  # one tensor for each of up to 4 ranks


def one_torchs(params):
    """On one rank the scaler unscales gradients before it clips them; on the others the fused step does."""
    return (torch.optim.AdamW if rank() == 0 else optim.AdamW)(params, lr=0.1)


MAKERS = {
    "fused": partial(optim.AdamW, lr=0.1),
    "torch's": partial(torch.optim.AdamW, lr=0.1),
    "torch's fused": partial(torch.optim.AdamW, lr=0.1, fused=True),
    "one torch's": one_torchs,
}


def whole():
    return torch.distributed.group.WORLD


def stage(dtype=torch.float32):
    """This rank's own parameter, as plain tensors of a pipeline or of tensor parallelism are."""
    generator = torch.Generator().manual_seed(7 + rank())
    return torch.randn(SIZES[rank()], generator=generator, dtype=dtype).requires_grad_()


def gradients(step, scale, dtype=torch.float32):
    """The scaled gradients of all stages in a step; each rank uses one."""
    generator = torch.Generator().manual_seed(100 + step)
    every = [torch.randn(size, generator=generator, dtype=torch.float64) for size in SIZES]
    return [(grad * scale).to(dtype) for grad in every[: torch.distributed.get_world_size()]]


def norm_of(grads, norm_type):
    return torch.cat([grad.flatten() for grad in grads]).norm(norm_type).item()


def stages(make, unscale_first=False, clip=None, bad_in=(2, 5)):
    """Against one process that has all stages: same skips, scales, norms and weights."""
    world = torch.distributed.get_world_size()
    param = stage()
    optimizer = make([param])
    scaler = GradScaler("cpu", init_scale=16.0, growth_interval=3, process_group=whole())
    every = [
        torch.randn(SIZES[r], generator=torch.Generator().manual_seed(7 + r)).requires_grad_()
        for r in range(world)
    ]
    expected, one = make(every), GradScaler("cpu", init_scale=16.0, growth_interval=3)
    one.scale(torch.ones(()))
    if rank() == world - 1:  # the last stage alone has the loss
        scaler.scale(torch.ones(()))
    for step in range(7):
        grads = gradients(step, one.get_scale())
        if step in bad_in:  # in the first stage alone
            grads[0].view(-1)[0] = math.inf if step % 2 else math.nan
        for p, grad in zip(every, grads, strict=True):
            p.grad = grad.clone()
        param.grad = grads[rank()]
        norms = []
        for s, o, group in ((scaler, optimizer, whole()), (one, expected, None)):
            if unscale_first:
                s.unscale_(o)
            if clip is not None:
                norms.append(s.clip_grad_norm_(o, *clip, process_group=group).item())
            s.step(o)
            s.update()
        assert agreed(scaler.get_scale()) == one.get_scale()
        assert agreed(scaler.last_step_skipped.item()) == (step in bad_in) == one.last_step_skipped.item()
        if norms and step not in bad_in:
            assert agreed(norms[0]) == pytest.approx(norms[1], rel=1e-6)  # FP32, other order of addition
        # One coefficient differs by at most 2 ulp of FP32, as norms do; AdamW's step keeps the relation.
        close = {"rtol": 1e-5, "atol": 1e-6} if clip else {"rtol": 0, "atol": 0}
        torch.testing.assert_close(param.detach(), every[rank()].detach(), **close)


def norms(deferred):
    """The norm counts each stage once, for every kind of norm, in FP64."""
    for norm_type in (0.0, 1.0, 2.0, 3.0, math.inf):
        param = stage(torch.float64)
        grads = gradients(0, 1.0, torch.float64)
        param.grad = grads[rank()].clone()
        expected = norm_of(grads, norm_type)
        if deferred:
            optimizer = optim.SGD([param], lr=0.1)
            scaler = GradScaler("cpu", init_scale=1.0, process_group=whole())
            norm = scaler.clip_grad_norm_(optimizer, expected / 2, norm_type, process_group=whole())
            assert torch.equal(param.grad, grads[rank()])  # until the step
            scaler.unscale_(optimizer)
        else:
            norm = fusedamp.clip_grad_norm_([param], expected / 2, norm_type, process_group=whole())
        assert agreed(norm.item()) == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(param.grad, grads[rank()] / 2, rtol=1e-5, atol=0)
        param.grad[0] = math.nan if rank() == 0 else 1.0
        norm = fusedamp.clip_grad_norm_([param], 1.0, norm_type, process_group=whole())
        assert norm_type == 0 or not agreed(math.isfinite(norm.item()))


def nothing_here(make):
    """A rank without gradients, or without any parameter that needs one, joins and counts the step."""
    param = stage()
    optimizer = make([param])
    scaler = GradScaler("cpu", init_scale=16.0, growth_interval=2, process_group=whole())
    for bad in (False, False, True):
        scale = agreed(scaler.get_scale())
        if rank() == 0:
            param.grad = torch.full_like(param, math.inf if bad else 3.0)
        norm = scaler.clip_grad_norm_(optimizer, 100.0, process_group=whole())
        if not bad:
            assert agreed(norm.item()) == pytest.approx(math.sqrt(math.prod(SIZES[0])) * 3 / scale)
        scaler.step(optimizer)
        scaler.update()
        assert agreed(scaler.last_step_skipped.item()) == bad
    assert agreed(scaler.get_scale()) == 16.0  # doubled after two good steps, halved after the bad one


def no_parameters():
    params = [stage()] if rank() == 0 else []
    for param in params:
        param.grad = torch.full_like(param, 2.0)
    norm = fusedamp.clip_grad_norm_(params, 1.0, process_group=whole())
    assert agreed(norm.item()) == pytest.approx(2 * math.sqrt(35))
    [param.grad.fill_(math.inf) for param in params]
    with pytest.raises(RuntimeError, match="non-finite"):  # on all ranks
        fusedamp.clip_grad_norm_(params, 1.0, error_if_nonfinite=True, process_group=whole())


def set_by_hand():
    """found_inf set by hand on one rank skips all, without changing the scale; so does grad_scale."""
    for name, values in (("found_inf", (0.0, 1.0)), ("grad_scale", (1.0, 1e-45))):
        for first in (False, True):
            param = torch.ones(3, requires_grad=True)
            optimizer = optim.AdamW([param], lr=0.1)
            scaler = GradScaler("cpu", init_scale=16.0, process_group=whole())
            scaler.scale(torch.ones(()))
            param.grad = torch.ones(3)
            if first:
                scaler.unscale_(optimizer)
            setattr(optimizer, name, torch.tensor(values[rank() % 2]))
            scaler.step(optimizer)
            assert agreed(scaler.last_step_skipped.item())
            assert torch.equal(param, torch.ones(3))
            scaler.update()
            assert agreed(scaler.get_scale()) == (16.0 if name == "found_inf" else 8.0)


def bad_replica():
    """A replica whose gradient is broken after the reduction does not leave the others."""
    net = nn.parallel.DistributedDataParallel(nn.Linear(4, 2))
    scaler = GradScaler("cpu", init_scale=16.0, process_group=whole())
    optimizer = optim.AdamW(net.parameters(), lr=0.1)
    for bad in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(3, 4) * (rank() + 1)).sum()).backward()
        if bad and rank() == 1:
            net.module.weight.grad[0, 0] = math.nan
        scaler.step(optimizer)
        scaler.update()
        assert agreed(scaler.last_step_skipped.item()) == bad
        agreed([p.tolist() for p in net.parameters()])
    assert agreed(scaler.get_scale()) == 8.0


def pipeline():
    """torch's GPipe: only the last stage scales a loss, and an overflow of the first skips all."""
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    world = torch.distributed.get_world_size()
    torch.manual_seed(0)
    layers = [nn.Linear(4, 4) for _ in range(world)]
    net = copy.deepcopy(layers[rank()])
    scaler = GradScaler("cpu", init_scale=4.0, growth_interval=1, process_group=whole())
    part = PipelineStage(net, rank(), world, torch.device("cpu"))
    schedule = ScheduleGPipe(
        part, 2, loss_fn=lambda out, target: scaler.scale((out - target).pow(2).mean()), scale_grads=False
    )
    reference = nn.Sequential(*layers)
    ours, theirs = (optim.AdamW(m.parameters(), lr=0.1) for m in (net, reference))
    one = GradScaler("cpu", init_scale=4.0, growth_interval=1)
    torch.manual_seed(1)
    for step in range(4):
        x, y = torch.randn(4, 4), torch.randn(4, 4)
        for optimizer in (ours, theirs):
            optimizer.zero_grad()
        schedule.step(*((x,) if rank() == 0 else ()), **({"target": y} if rank() == world - 1 else {}))
        for a, b in zip(x.chunk(2), y.chunk(2), strict=True):
            one.scale((reference(a) - b).pow(2).mean()).backward()
        if step == 2:
            reference[0].weight.grad[1, 1] = math.inf
            if rank() == 0:
                net.weight.grad[1, 1] = math.inf
        for s, o, group in ((scaler, ours, whole()), (one, theirs, None)):
            s.clip_grad_norm_(o, 0.5, process_group=group)
            s.step(o)
            s.update()
        assert agreed(scaler.get_scale()) == one.get_scale()
        assert agreed(scaler.last_step_skipped.item()) == (step == 2)
        for p, q in zip(net.parameters(), reference[rank()].parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)  # products of other sizes


def experts():
    """4 ranks: a dense weight over all, an expert's weight over each row of the mesh, a copy on all."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "dp"))
    row = rank() // 2

    def tensors(seed):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randn(n, 3, generator=generator, dtype=torch.float64) for n in (5, 4, 4, 2)]

    def mine(values):
        dense, first, second, copied = values
        return [
            distribute_tensor(dense, mesh, [Shard(0), Shard(0)]),
            distribute_tensor(second if row else first, mesh["dp"], [Shard(0)], src_data_rank=None),
            distribute_tensor(copied, mesh, [Replicate(), Replicate()]),
        ]

    params = [p.requires_grad_() for p in mine(tensors(1))]
    scaler = GradScaler("cpu", init_scale=1.0, process_group=whole())
    optimizer = optim.SGD(params, lr=1.0)
    grads = tensors(2)
    for norm_type in (1.0, 2.0, math.inf):
        expected = norm_of(grads, norm_type)
        for param, grad in zip(params, mine(grads), strict=True):
            param.grad = grad
        wanted = r"meshes have the ranks \[0, 1, 2, 3\] and \[\d, \d\]; .* Pass process_group"
        with pytest.raises(RuntimeError, match=r"\[clip_grad_norm_\] the parameters' " + wanted):
            fusedamp.clip_grad_norm_(params, 1.0, norm_type)
        with pytest.raises(RuntimeError, match=r"\[GradScaler.clip_grad_norm_\] the parameters' " + wanted):
            scaler.clip_grad_norm_(optimizer, 1.0, norm_type)
        for group in (whole(), mesh["ep"].get_group()):
            norm = fusedamp.clip_grad_norm_(params, math.inf, norm_type, process_group=group)
            assert agreed(norm.item()) == pytest.approx(expected, rel=1e-12)
    # The rows as replicas of one model: each row's own norm, as mesh["dp"] holds it whole.
    norm = fusedamp.clip_grad_norm_(params, math.inf, process_group=mesh["dp"].get_group())
    assert norm.item() == pytest.approx(norm_of([grads[0], grads[1 + row], grads[3]], 2.0), rel=1e-12)
    before = [p.full_tensor().clone() for p in params]
    if rank() == 3:
        params[1].grad.to_local().fill_(math.inf)
    scaler.step(optimizer)
    scaler.update()
    assert agreed(scaler.get_scale()) == 0.5
    assert all(torch.equal(p.full_tensor(), old) for p, old in zip(params, before, strict=True))


def refused():
    param = torch.ones(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = optim.AdamW([param], lr=0.1)
    not_mine = torch.distributed.new_group([0])
    for bad in (3, "world", not_mine if rank() else [0]):
        for op, call in {
            "GradScaler": lambda bad: GradScaler("cpu", process_group=bad),
            "clip_grad_norm_": lambda bad: fusedamp.clip_grad_norm_([param], 1.0, process_group=bad),
            "GradScaler.clip_grad_norm_": lambda bad: GradScaler("cpu", enabled=False).clip_grad_norm_(
                optimizer, 1.0, process_group=bad
            ),
        }.items():
            with pytest.raises(TypeError, match=rf"\[{op}\] process_group is .*; expected a .*ProcessGroup"):
                call(bad)
    plain = GradScaler("cpu", init_scale=1.0)
    plain.scale(torch.ones(()))
    with pytest.raises(RuntimeError, match="and the scaler has none; expected both"):
        plain.clip_grad_norm_(optimizer, 1.0, process_group=whole())
    scaler = GradScaler("cpu", init_scale=1.0, process_group=whole())
    for copied in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"\[GradScaler\] has a process_group, .* Save state_dict"):
            copied(scaler)
    scaler.clip_grad_norm_(optimizer, 1.0, process_group=whole())
    param.grad.add_(1)
    for method in (scaler.step, scaler.unscale_):
        with pytest.raises(RuntimeError, match="changed after clip_grad_norm_ with process_group"):
            method(optimizer)
    assert torch.equal(param, torch.ones(3))

    class Legacy(torch.optim.SGD):
        _step_supports_amp_scaling = True

        def step(self, closure=None, grad_scaler=None):
            raise AssertionError("was called")

    with pytest.raises(RuntimeError, match=r"Legacy.step takes the scaler itself.* Remove the argument"):
        scaler.step(Legacy([param], lr=0.1))
    param._fsdp_flattened = True
    for clip in (
        partial(fusedamp.clip_grad_norm_, [param, stage()]),
        partial(scaler.clip_grad_norm_, optim.AdamW([param, stage()])),
    ):
        with pytest.raises(
            RuntimeError, match=r"parameter 1 of .* is not sharded, and parameter 0 is .*FSDP1"
        ):
            clip(1.0, process_group=whole())


def clipped_twice():
    """By ranks of which one clips in place at once, and one in its step."""
    param = stage()
    grads = gradients(0, 1.0)
    param.grad = grads[rank()].clone()
    optimizer = (optim.SGD if rank() else torch.optim.SGD)([param], lr=1.0)
    scaler = GradScaler("cpu", init_scale=1.0, process_group=whole())
    before, expected = param.detach().clone(), norm_of(grads, 2.0)
    for max_norm, norm in ((expected / 4, expected), (expected / 8, expected / 4)):
        found = scaler.clip_grad_norm_(optimizer, max_norm, process_group=whole())
        assert agreed(found.item()) == pytest.approx(norm, rel=1e-5)
    scaler.step(optimizer)
    torch.testing.assert_close(before - param.detach(), grads[rank()] / 8, rtol=1e-5, atol=1e-6)


def disabled():
    """BF16 needs no scaler, but clipping."""
    param = stage()
    grads = gradients(0, 1.0)
    param.grad = grads[rank()].clone()
    scaler = GradScaler("cpu", enabled=False)
    norm = scaler.clip_grad_norm_(optim.AdamW([param]), math.inf, process_group=whole())
    assert agreed(norm.item()) == pytest.approx(norm_of(grads, 2.0), rel=1e-6)


STAGES = {
    f"stages, {name}{', unscaled first' * first}{f', clipped {clip}' if clip else ''}": partial(
        stages, make, first, clip
    )
    for name, make in MAKERS.items()
    for first in (False, True)
    for clip in (None, (0.5,), (0.5, math.inf))
    if name == "fused" or clip != (0.5, math.inf)
}
BOTH = STAGES | {
    "norms at once": partial(norms, False),
    "norms of the fused step": partial(norms, True),
    "bad replica": bad_replica,
    "pipeline": pipeline,
}
SCENARIOS = {
    2: BOTH
    | {f"nothing here, {name}": partial(nothing_here, make) for name, make in MAKERS.items()}
    | {
        "no parameters": no_parameters,
        "set by hand": set_by_hand,
        "refused": refused,
        "disabled": disabled,
        "clipped twice": clipped_twice,
    },
    4: {name: BOTH[name] for name in ("stages, fused, clipped (0.5,)", "norms of the fused step", "pipeline")}
    | {"experts": experts},
}
ranks, test_on_ranks = spawned(SCENARIOS)
