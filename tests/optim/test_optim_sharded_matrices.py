"""Muon and Adafactor on DTensors, on 2 and 4 gloo ranks: as one process with whole tensors, replicas alike.

Sizes that no number of ranks divides, matrices of one row, whose shards are mostly empty, and each layout in
which FSDP2, HSDP and tensor parallelism place weights. The reference is the same optimizer on plain tensors.
"""

import copy
import math
from functools import partial
from pathlib import Path

import fusedamp
import pytest
import torch
import torch.multiprocessing as mp
from cases import bits, kept, make_params, set_grads
from fusedamp import optim
from ranks import run_scenarios
from tolerances import unit

dist = torch.distributed
pytestmark = [
    pytest.mark.host,
    pytest.mark.skipif(
        not dist.is_available() or not dist.is_gloo_available(), reason="needs torch.distributed with gloo"
    ),
]
SHAPES = [(5, 7), (1, 6), (9, 4), (7,), (6, 10), (3, 11), (4, 3, 5), (8, 2), (4, 4)]
KINDS = {
    "muon": partial(optim.Muon, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    "adafactor": partial(optim.Adafactor, lr=0.02, weight_decay=0.1),
}
DTYPES = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16-none": (torch.bfloat16, {"master_weights": "none"}),
    "fp64": (torch.float64, {}),
}


def layouts(world):
    """The mesh's shape and each parameter's placements along it, in turn; None is a plain parameter."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    rows, columns, all_of_it = Shard(0), Shard(1), Replicate()
    flat = {"rows": ((world,), [(rows,)]), "mixed": ((world,), [(rows,), None, (columns,), (all_of_it,)])}
    if world == 2:
        return flat
    return flat | {
        "hsdp": ((2, 2), [(all_of_it, rows)]),
        "fsdp-tp": ((2, 2), [(_StridedShard(0, split_factor=2), rows), (rows, columns), (rows, all_of_it)]),
        "columns-tp": ((2, 2), [(columns, rows), (columns, columns), (all_of_it, columns)]),
    }


def placed(value, mesh, placements):
    """``value``, which each rank has, as a DTensor; dimensions that it does not have stay whole."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    value = value.clone()  # a replicated DTensor shares its memory
    if placements is None:
        return value
    fitting = [p if getattr(p, "dim", 0) < value.dim() else Replicate() for p in placements]
    return distribute_tensor(value, mesh, fitting, src_data_rank=None)


class World:
    """The same parameters whole and sharded, an optimizer of each, and gradients for both."""

    def __init__(self, kind, layout, dtype, shapes=SHAPES, **options):
        from torch.distributed.device_mesh import init_device_mesh

        self.dtype, storage = DTYPES[dtype]
        shape, places = layouts(dist.get_world_size())[layout]
        self.mesh = init_device_mesh("cpu", shape, mesh_dim_names=("dp", "tp")[: len(shape)])
        self.places = [places[i % len(places)] for i in range(len(shapes))]
        self.whole = make_params(self.dtype, shapes)
        self.params = [torch.nn.Parameter(self.placed(i, p.detach())) for i, p in enumerate(self.whole)]
        self.expected, self.optimizer = (KINDS[kind](p, **options, **storage) for p in (self.whole, self.params))
        self.kind = kind

    def placed(self, i, value):
        return placed(value, self.mesh, self.places[i])

    def set_grads(self, seed):
        for i, (p, grad) in enumerate(zip(self.params, set_grads(self.whole, seed), strict=True)):
            p.grad = self.placed(i, grad)

    def train(self, seeds):
        for seed in seeds:
            self.set_grads(seed)
            self.expected.step()
            self.optimizer.step()
            self.compare()

    def compare(self):
        """Everything is the whole tensors': Muon bit for bit, Adafactor to the roundings of its sums."""
        steps = max(entry["step"].item() for entry in self.optimizer.state.values())
        for p, q in zip(self.params, self.whole, strict=True):
            self._compare(p, q, steps, "weight")
            ours, theirs = kept(self.optimizer.state[p]), kept(self.expected.state[q])
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                self._compare(value, theirs[name], steps, name)

    def _compare(self, got, wanted, steps, name):
        got = got.full_tensor() if hasattr(got, "full_tensor") else got
        if self.kind == "muon":
            assert bits(got) == bits(wanted), name
            return
        # A sum of at most 33 terms in another order: a factor of the update, which is at most lr per step.
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rounding = 33 * steps * unit(wide)
        torch.testing.assert_close(got, wanted, rtol=2 * rounding + 2 * unit(got.dtype), atol=0.02 * rounding)


def alike(values):
    """All ranks have the same bits of ``values``, which are local tensors."""
    mine = [bits(value) for value in values]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    assert all(other == mine for other in everyone)


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def as_whole(kind, layout, dtype):
    world = World(kind, layout, dtype)
    world.train(range(5))


def scenarios(world):
    calls = {}
    for kind in KINDS:
        for layout in ("rows", "mixed") if world == 2 else ("rows", "mixed", "hsdp", "fsdp-tp", "columns-tp"):
            for dtype in DTYPES:
                calls[f"{kind} {layout} {dtype}"] = partial(as_whole, kind, layout, dtype)
    return calls


def run_all(rank, world, folder):
    run_scenarios(scenarios(world), rank, world, folder)


@pytest.fixture(scope="module", params=[2, 4], ids=["2 ranks", "4 ranks"])
def folder(request, tmp_path_factory):
    path = Path(tmp_path_factory.mktemp("ranks"))
    mp.spawn(run_all, (request.param, path), nprocs=request.param)
    return request.param, path
