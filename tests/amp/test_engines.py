"""torch's engines for several devices with GradScaler and our optimizers, on 2 and 4 gloo ranks: training
against one process on the whole batch, with an overflow in one rank's data or shard; all ranks agree.
"""

import copy
from functools import partial

import fusedamp
import torch
from cases import BY_NAME
from fusedamp import GradScaler, optim
from ranks import agreed, needs_gloo, rank, spawned
from torch import nn

dist = torch.distributed
pytestmark = needs_gloo
ROWS, STEPS, BAD = 8, 5, 3


class Net(nn.Module):
    """Sizes that no world divides, a norm, and a weight of one row, of which some ranks have nothing."""

    def __init__(self, wide=7, narrow=6):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Linear(5, wide), nn.LayerNorm(wide)
        self.second, self.last = nn.Linear(wide, narrow), nn.Linear(narrow, 1, bias=False)

    def forward(self, x):
        return self.last(torch.tanh(self.second(self.norm(self.first(x)))))


def batch(step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(ROWS, 5, generator=generator).to(dtype)


def mesh(*names):
    from torch.distributed.device_mesh import init_device_mesh

    world = dist.get_world_size()
    sizes = (world,) if len(names) == 1 else (2, world // 2)
    return init_device_mesh("cpu", sizes, mesh_dim_names=names)


def fsdp2(policy=None, replicate=False, offload=False, **options):
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, fully_shard

    options |= {"mesh": mesh("replicas", "shards") if replicate else mesh("shards")}
    if policy is not None:
        options["mp_policy"] = MixedPrecisionPolicy(param_dtype=policy, reduce_dtype=torch.float32)
    if offload:
        options["offload_policy"] = CPUOffloadPolicy(pin_memory=False)

    def wrap(net):
        for layer in (net.first, net.second, net.last, net):
            fully_shard(layer, **options)
        return net

    return wrap


def tensor_parallel(sequence=False, sharded=False):
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    def wrap(net):
        both = mesh("dp", "tp") if sharded else None
        along = both["tp"] if sharded else mesh("tp")
        plan = {
            "first": ColwiseParallel(output_layouts=Replicate()),
            "second": ColwiseParallel(),
            "last": RowwiseParallel(),
        }
        if sequence:  # the norm's gradients are partial sums
            plan["first"] = ColwiseParallel(output_layouts=Shard(0))
            plan["norm"] = SequenceParallel(sequence_dim=0)
            plan["second"] = ColwiseParallel(input_layouts=Shard(0))
        parallelize_module(net, along, plan)
        if sharded:
            for layer in (net.first, net.second, net.last, net):
                fully_shard(layer, mesh=both["dp"])
        return net

    return wrap


def ddp(hook=None, **options):
    def wrap(net):
        made = nn.parallel.DistributedDataParallel(net, **options)
        if hook is not None:
            from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

            made.register_comm_hook(None, getattr(default_hooks, hook))
        return made

    return wrap


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trains_as_one(
    wrap,
    case="adamw",
    clip="scaler",
    dtype=torch.float32,
    splits=True,
    close=1e-6,
    sizes=(),
    within=None,
    **options,
):
    """Check training of the net that ``wrap`` returns.

    Args:
        splits: each rank has a part of the batch; else all have the whole one.
        close: the largest difference of a weight, in relation to the way that a weight has come.
        sizes: of the net.
        within: the mesh dimension whose ranks together hold the model, if meshes differ.
    """
    make = partial(BY_NAME[case].ours, lr=0.05, **options)
    reference = Net(*sizes).to(dtype)
    net = wrap(copy.deepcopy(reference))
    ours, expected = make(net.parameters()), make(reference.parameters())
    whole_model = None if within is None else mesh("dp", "tp")[within].get_group()
    everyone = None if within is None else dist.group.WORLD
    scaler = GradScaler("cpu", init_scale=64.0, growth_interval=2, process_group=everyone)
    one = GradScaler("cpu", init_scale=64.0, growth_interval=2)
    world = dist.get_world_size()
    for step in range(STEPS):
        x = batch(step, dtype)
        if step == BAD:
            x[-1] = torch.inf  # the last rank's part of the batch
        share = x.chunk(world)[rank()] if splits else x
        for m, s, o, data in ((net, scaler, ours, share), (reference, one, expected, x)):
            o.zero_grad()
            s.scale(m(data).float().pow(2).mean()).backward()
            if clip == "scaler":
                s.clip_grad_norm_(o, 0.3, process_group=whole_model if s is scaler else None)
            elif clip is not None:
                s.unscale_(o)
                {"torch": nn.utils.clip_grad_norm_, "ours": fusedamp.clip_grad_norm_}[clip](
                    m.parameters(), 0.3
                )
            s.step(o)
            s.update()
        assert agreed(scaler.get_scale()) == one.get_scale()
        assert agreed(scaler.last_step_skipped.item()) == one.last_step_skipped.item() == (step == BAD)
    after = [whole(p.detach()) for p in net.parameters()]
    agreed([p.tolist() for p in after])
    for p, q, start in zip(after, reference.parameters(), Net(*sizes).parameters(), strict=True):
        moved = (q.detach().float() - start.detach()).abs().max().item()
        assert (p.float() - q.detach().float()).abs().max().item() <= close * max(moved, 1e-3)


def accumulates():
    """Two micro-batches without communication in the first."""
    net, reference = Net(), Net()
    net = nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
    ours, expected = (optim.AdamW(m.parameters(), lr=0.05) for m in (net, reference))
    scaler, one = (GradScaler("cpu", init_scale=64.0) for _ in range(2))
    for step in range(3):
        x = batch(step)
        for o in (ours, expected):
            o.zero_grad()
        parts = x.chunk(dist.get_world_size())[rank()].chunk(2)
        with net.no_sync():
            scaler.scale(net(parts[0]).pow(2).mean() / 2).backward()
        scaler.scale(net(parts[1]).pow(2).mean() / 2).backward()
        one.scale(reference(x).pow(2).mean()).backward()
        for s, o in ((scaler, ours), (one, expected)):
            s.step(o)
            s.update()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def zero_redundancy(**options):
    """Each rank updates some parameters, and broadcasts them; states are gathered and loaded."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    net = nn.parallel.DistributedDataParallel(Net().bfloat16())
    reference = copy.deepcopy(net)
    ours = ZeroRedundancyOptimizer(net.parameters(), optim.AdamW, lr=0.05, **options)
    expected = optim.AdamW(reference.parameters(), lr=0.05, **options)
    for step in range(3):
        x = batch(step, torch.bfloat16).chunk(dist.get_world_size())[rank()]
        for m, o in ((net, ours), (reference, expected)):
            o.zero_grad()
            m(x).float().pow(2).mean().backward()
            o.step()
    exact = not options  # random numbers belong to a parameter's position in its optimizer
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        if exact:
            assert torch.equal(p, q)
        else:
            torch.testing.assert_close(p, q, rtol=2**-6, atol=2**-6)
    agreed([p.tolist() for p in net.parameters()])
    ours.consolidate_state_dict(to=0)
    if rank() == 0:
        saved = ours.state_dict()
        assert len(saved["state"]) == len(list(net.parameters()))


def several_optimizers():
    """One scaler over two optimizers, each with shards: an overflow in one lowers the scale for all."""
    net = fsdp2()(Net())
    pairs = [list(net.first.parameters()), [*net.second.parameters(), *net.last.parameters()]]
    optimizers = [optim.AdamW(params, lr=0.05) for params in pairs]
    scaler = GradScaler("cpu", init_scale=64.0)
    for bad in (False, True):
        for o in optimizers:
            o.zero_grad()
        scaler.scale(net(batch(1)).pow(2).mean()).backward()
        if bad and rank() == 0:
            net.second.weight.grad.to_local().fill_(torch.nan)
        skipped = []
        for o in optimizers:
            scaler.step(o)
            skipped.append(scaler.last_step_skipped.item())
        scaler.update()
        assert agreed(skipped) == [False, bad]
    assert agreed(scaler.get_scale()) == 32.0


EVEN = {"splits": False, "sizes": (8, 8)}  # torch's tensor parallelism needs sizes that the world divides
HALF = {"close": 0.2}  # products and sums in 16 bits: ranks agree, and stay near one process


def run(wrap, arguments, **options):
    trains_as_one(wrap(**arguments), **options)


CLIPS = [
    ("adamw", "scaler"),
    ("adamw", "torch"),
    ("sgd-nesterov", "ours"),
    ("adagrad", None),
    ("lamb", "scaler"),
]
TWO = {
    **{f"FSDP2, {case}, clip by {by}": partial(run, fsdp2, {}, case=case, clip=by) for case, by in CLIPS},
    "FSDP2, BF16 policy": partial(run, fsdp2, {"policy": torch.bfloat16}, **HALF),
    "FSDP2, FP16 policy": partial(run, fsdp2, {"policy": torch.float16}, **HALF),
    "FSDP2, BF16 weights": partial(run, fsdp2, {}, dtype=torch.bfloat16, master_weights="split", **HALF),
    "FSDP2, kept after forward": partial(run, fsdp2, {"reshard_after_forward": False}),
    "FSDP2, offloaded by torch": partial(run, fsdp2, {"offload": True}),
    "tensor parallel": partial(run, tensor_parallel, {}, **EVEN),
    "sequence parallel": partial(run, tensor_parallel, {"sequence": True}, **EVEN),
    "DDP": partial(run, ddp, {}),
    "DDP, tiny buckets": partial(run, ddp, {"gradient_as_bucket_view": True, "bucket_cap_mb": 1e-6}),
    "DDP, static graph": partial(run, ddp, {"static_graph": True}),
    "DDP, FP16 hook": partial(run, ddp, {"hook": "fp16_compress_hook"}, **HALF),
    "DDP, accumulation": accumulates,
    "zero redundancy": zero_redundancy,
    "zero redundancy, 8 bits": partial(zero_redundancy, master_weights="split", state_dtype="int8"),
    "several optimizers": several_optimizers,
}  # fmt: skip
PARALLEL = ("tensor parallel", "sequence parallel")
SCENARIOS = {
    2: TWO,
    4: {
        name: TWO[name]
        for name in ("FSDP2, adamw, clip by scaler", "tensor parallel", "sequence parallel", "DDP")
    }
    | {
        "HSDP": partial(run, fsdp2, {"replicate": True}),
        "HSDP, LAMB": partial(run, fsdp2, {"replicate": True}, case="lamb"),
        "FSDP2 over tensor parallel": partial(run, tensor_parallel, {"sharded": True}, clip=None, **EVEN),
        "FSDP2 over tensor parallel, clipped": partial(
            run, tensor_parallel, {"sharded": True}, within="dp", **EVEN
        ),
    },
}
ranks, test_on_ranks = spawned(SCENARIOS)
