"""Sharding changes nothing, on 2 and 4 gloo ranks: elementwise rules with random numbers have the bits of one
process, rules with norms of whole tensors agree to the last bits, and an overflow in one shard skips all.
"""

import math
from functools import partial

import torch
from cases import BY_NAME, kept
from fusedamp import GradScaler
from fusedamp.optim.state.encoded import plain
from fusedamp.tensors import travel
from ranks import agreed, needs_gloo, rank, spawned

dist = torch.distributed
pytestmark = needs_gloo
SHAPES = [(7, 6), (5,), (1, 9), (6, 4, 3), (8, 12), (13,)]  # one row: some ranks have nothing
FORMATS = {
    "fp32 weights": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "fp16 split": (torch.float16, {"master_weights": "split"}),
    "bf16 split, bf16 states": (
        torch.bfloat16,
        {"master_weights": "split", "state_dtype": "bfloat16", "rounding_seed": 3},
    ),
    "bf16 rounded, bf16 states": (
        torch.bfloat16,
        {
            "master_weights": "none",
            "stochastic_rounding": True,
            "state_dtype": "bfloat16",
            "rounding_seed": 3,
        },
    ),
    "fp16 rounded": (
        torch.float16,
        {"master_weights": "none", "stochastic_rounding": True, "rounding_seed": 3},
    ),
}


def placements_of(name, shape):
    """A mesh, and placements on it for a tensor of ``shape``."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard

    world = dist.get_world_size()
    last = len(shape) - 1
    if name == "rows":
        return init_device_mesh("cpu", (world,)), [Shard(0)]
    if name == "columns":
        return init_device_mesh("cpu", (world,)), [Shard(last)]
    if name == "mixed":
        return init_device_mesh("cpu", (world,)), [Shard(0) if len(shape) > 1 else Replicate()]
    mesh = init_device_mesh("cpu", (2, world // 2))
    return mesh, {
        "hybrid": [Replicate(), Shard(0)],
        "both": [Shard(0), Shard(last)] if last else [Replicate(), Shard(0)],
        "rows twice": [Shard(0), Shard(0)],
    }[name]


def whole(value):
    value = plain(value)
    if not hasattr(value, "full_tensor"):
        return value
    if value.dtype == torch.int16:
        return travel.from_bytes(travel.as_bytes(value).full_tensor())
    return value.full_tensor()


def gradients(step, scale, dtype):
    generator = torch.Generator().manual_seed(100 + step)
    return [(torch.randn(shape, generator=generator) * scale).to(dtype) for shape in SHAPES]


def sharding_changes_nothing(case, form, layout, clip=None):
    """Six steps with a skipped one, against one process with whole tensors."""
    from torch.distributed.tensor import distribute_tensor

    dtype, options = FORMATS[form]
    case = BY_NAME[case]
    torch.manual_seed(0)
    values = [torch.randn(shape).to(dtype) for shape in SHAPES]
    where = [placements_of(layout, shape) for shape in SHAPES]
    params = [
        torch.nn.Parameter(distribute_tensor(value, *place))
        for value, place in zip(values, where, strict=True)
    ]
    every = [torch.nn.Parameter(value.clone()) for value in values]
    ours, expected = (case.ours(p, **case.options, **options) for p in (params, every))
    scaler, one = (GradScaler("cpu", init_scale=8.0) for _ in range(2))
    for s in (scaler, one):
        s.scale(torch.ones(()))
    for step in range(6):
        grads = gradients(step, one.get_scale(), dtype)
        if step == 3:
            grads[3].view(-1)[-1] = math.inf  # in one rank's shard
        if step == 4:
            grads[1] = None  # no rank has a gradient
        for p, q, grad, place in zip(params, every, grads, where, strict=True):
            q.grad = grad
            p.grad = None if grad is None else distribute_tensor(grad, *place)
        for s, o in ((scaler, ours), (one, expected)):
            if clip is not None:
                s.clip_grad_norm_(o, clip)
            s.step(o)
            s.update()
        assert agreed(scaler.get_scale()) == one.get_scale()
        assert agreed(scaler.last_step_skipped.item()) == (step == 3)
    for p, q in zip(params, every, strict=True):
        compare = (
            exactly if clip is None and case.ours.__name__ not in ("LAMB", "LARS", "NovoGrad") else nearly
        )
        compare(whole(p.detach()), q.detach())
        assert ours.state[p].keys() == expected.state[q].keys()
        if compare is nearly and dtype != torch.float32:  # the last bits of masters, which states follow
            continue
        for name, value in kept(ours.state[p]).items():
            compare(whole(value), whole(kept(expected.state[q])[name]))
    agreed([whole(p.detach()).tolist() for p in params])


def exactly(got, wanted):
    assert got.dtype == wanted.dtype
    assert torch.equal(got, wanted)


def nearly(got, wanted):
    """Sums of squares in FP64 differ by their order, in the last bits; coefficients are rounded to FP32.

    So a step differs by 1 ulp of FP32 in relation to its length, and six by a few; a 16-bit weight may round
    to its other neighbor.
    """
    ulp = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-10}.get(got.dtype, 2.0**-23)
    torch.testing.assert_close(
        got, wanted, rtol=8 * ulp if got.dtype == torch.float32 else ulp, atol=2.0**-20
    )


def measured_over_ranks():
    """LAMB's norms of shards of one element each: the whole norms, where a shard's own would be 1."""
    from torch.distributed.tensor import distribute_tensor

    world = dist.get_world_size()
    value = torch.arange(1.0, world + 1)
    mesh, placements = placements_of("rows", value.shape)
    for name, options in {"lamb": {"weight_decay": 0.0}, "lars": {}, "novograd": {}}.items():
        param = torch.nn.Parameter(distribute_tensor(value, mesh, placements))
        single = torch.nn.Parameter(value.clone())
        for p in (param, single):
            p.grad = torch.ones_like(p)
            BY_NAME[name].ours([p], lr=0.5, **options).step()
        gathered = param.full_tensor()
        nearly(gathered, single)
        own = torch.nn.Parameter(value[rank() : rank() + 1].clone())
        own.grad = torch.ones(1)
        BY_NAME[name].ours([own], lr=0.5, **options).step()
        if name == "lamb" and rank() == world - 1:
            assert (own - gathered[-1]).abs() > 1e-2


def bytes_on_the_wire():
    """An agreement is one reduction of 4 bytes; norms are one of 16 bytes per tensor and mesh dimension."""
    from unittest.mock import patch

    from torch.distributed.tensor import distribute_tensor

    sent = []

    def counted(tensor, *args, **kwargs):
        sent.append(tensor.nbytes)
        return reduced(tensor, *args, **kwargs)

    reduced = dist.all_reduce
    param = torch.nn.Parameter(torch.ones(3))
    optimizer, scaler = BY_NAME["adamw"].ours([param]), GradScaler("cpu", process_group=dist.group.WORLD)
    mesh, placements = placements_of("rows", (6, 2))
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, placements)) for _ in range(5)]
    lamb, plain_scaler = BY_NAME["lamb"].ours(params), GradScaler("cpu")
    plain_scaler.scale(torch.ones(()))
    for step in range(4):  # the same with a plan as without one
        param.grad = torch.ones(3)
        for p in params:
            p.grad = torch.ones_like(p)
        with patch.object(dist, "all_reduce", counted):
            scaler.step(optimizer)
            assert sent == [4], step
            scaler.update()
            assert sent == [4]
            sent.clear()
            lamb.step()
            assert sent == [5 * 16]
            sent.clear()
            plain_scaler.step(lamb)
            plain_scaler.update()
            assert sent == [4, 5 * 16]
            sent.clear()


def some_without_gradients():
    """A rank without a gradient joins the reduction, so the others do not wait for it."""
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = placements_of("rows", (6, 2))
    params = [torch.nn.Parameter(distribute_tensor(torch.ones(6, 2), mesh, placements)) for _ in range(2)]
    optimizer = BY_NAME["lamb"].ours(params, lr=0.1)
    params[0].grad = torch.ones_like(params[0])
    if rank() == 0:
        params[1].grad = torch.ones_like(params[1])
    optimizer.step()
    moved = params[1].to_local() != 1
    assert moved.all() if rank() == 0 else not moved.any()
    for p in params:
        p.grad = None
    if rank():
        params[0].grad = torch.ones_like(params[0])
    optimizer.step()


def fsdp2_over_tensor_parallel(case):
    """FSDP2 shards what tensor parallelism sharded: rows of one rank are not those of its position."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    def network():
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 6)).bfloat16()

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    net, reference = network(), network()
    parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
    for layer in (*net, net):
        fully_shard(layer, mesh=mesh["dp"])
    options = FORMATS["bf16 rounded, bf16 states"][1]
    ours, expected = (BY_NAME[case].ours(m.parameters(), lr=0.1, **options) for m in (net, reference))
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        for p, q in zip(net.parameters(), reference.parameters(), strict=True):
            q.grad = torch.randn(q.shape, generator=generator).bfloat16()
            grad = distribute_tensor(q.grad, p.device_mesh, [placed(s) for s in p.placements])
            p.grad = grad.redistribute(placements=p.placements)
        ours.step()
        expected.step()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        (exactly if case == "adamw" else nearly)(p.full_tensor(), q)


def placed(placement):
    """distribute_tensor takes no _StridedShard."""
    from torch.distributed.tensor import Replicate

    return Replicate() if hasattr(placement, "split_factor") else placement


NORMS = ("lamb", "lars", "novograd")
TWO = {
    f"{case}, {form}, {layout}": partial(sharding_changes_nothing, case, form, layout)
    for case in ("adamw", "lion", "adagrad", "nadam", *NORMS)
    for form in FORMATS
    for layout in ("rows", "columns", "mixed")
    if case in ("adamw", "lamb") or (form.startswith("bf16 rounded") and layout == "rows")
    if case not in NORMS or "rounded" not in form or form.startswith("bf16")
    if layout == "rows" or form == "bf16 rounded, bf16 states"
}
FOUR = {
    f"{case}, {form}, {layout}": partial(sharding_changes_nothing, case, form, layout)
    for case in ("adamw", "lamb")
    for form in ("fp32 weights", "bf16 rounded, bf16 states")
    for layout in ("rows", "hybrid", "both", "rows twice")
    if form != "fp32 weights" or layout in ("rows", "hybrid")
}
SCENARIOS = {
    2: TWO
    | {
        f"{case} clipped": partial(sharding_changes_nothing, case, "fp32 weights", "rows", 0.5)
        for case in ("adamw", "lamb")
    }
    | {
        "bytes on the wire": bytes_on_the_wire,
        "measured over ranks": measured_over_ranks,
        "some without gradients": some_without_gradients,
    },
    4: FOUR
    | {
        f"{case}, FSDP2 over tensor parallel": partial(fsdp2_over_tensor_parallel, case)
        for case in ("adamw", "lamb")
    }
    | {"measured over ranks": measured_over_ranks},
}
ranks, test_on_ranks = spawned(SCENARIOS)
