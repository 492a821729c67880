"""Optimizers of DTensors beside the same optimizer of whole tensors, for tests on several ranks."""

import itertools
from functools import partial

import torch
from cases import bits, kept, make_params, set_grads
from fusedamp import optim
from fusedamp.tensors.blocks import split_over
from tolerances import unit
from torch import nn

dist = torch.distributed
SHAPES = [(5, 7), (1, 6), (9, 4), (7,), (6, 10), (3, 11), (4, 3, 5), (8, 2), (4, 4), (0, 4), (3, 0)]
MOST = 60  # elements
LR = 0.02
KINDS = {
    "muon": partial(optim.Muon, lr=LR, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    "adafactor": partial(optim.Adafactor, lr=LR, weight_decay=0.1),
}
FORMATS = {
    "fp32": (torch.float32, {}),
    "bf16": (torch.bfloat16, {}),
    "bf16 without masters": (torch.bfloat16, {"master_weights": "none"}),
    "fp64": (torch.float64, {}),
}

_names = itertools.count()


def layouts(world):
    """The mesh's shape, and placements that parameters have in turn; None is a plain parameter."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    rows, columns, whole = Shard(0), Shard(1), Replicate()
    flat = {"rows": ((world,), [(rows,)]), "mixed": ((world,), [(rows,), None, (columns,), (whole,)])}
    if world == 2:
        return flat
    return flat | {
        "hsdp": ((2, 2), [(whole, rows)]),
        "fsdp and tp": ((2, 2), [(_StridedShard(0, split_factor=2), rows), (rows, columns), (rows, whole)]),
        "columns": ((2, 2), [(columns, rows), (columns, columns), (whole, columns)]),
    }


def placed(value, mesh, placements):
    """``value``, which each rank has, as a DTensor; a dimension that it does not have is not sharded."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    value = value.clone()  # replicas would share its memory
    if placements is None:
        return value
    fitting = [p if getattr(p, "dim", 0) < value.dim() else Replicate() for p in placements]
    return distribute_tensor(value, mesh, fitting, src_data_rank=None)


def whole(tensor):
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def local(tensor):
    return getattr(tensor, "_local_tensor", tensor)


def mesh_of(shape):
    """A mesh with unique names: torch's caches return equal meshes, also of process groups that are gone."""
    from torch.distributed.device_mesh import init_device_mesh

    name = next(_names)
    return init_device_mesh("cpu", shape, mesh_dim_names=(f"dp{name}", f"tp{name}")[-len(shape) :])


class World:
    """The same parameters whole and sharded, an optimizer of each, and gradients for both."""

    def __init__(self, kind, layout, form="fp32", shapes=SHAPES, mesh=None):
        self.kind, (self.dtype, storage) = kind, FORMATS[form]
        shape, places = layouts(dist.get_world_size())[layout]
        self.mesh = mesh = mesh_of(shape) if mesh is None else mesh
        self.place = [
            partial(placed, mesh=mesh, placements=places[i % len(places)]) for i in range(len(shapes))
        ]
        self.whole = make_params(self.dtype, shapes)
        self.params = [nn.Parameter(self.place[i](p.detach())) for i, p in enumerate(self.whole)]
        self.flips = 2 if "master_weights" not in storage else 2 * 6  # times that a 16-bit weight was rounded
        self.expected, self.optimizer = (KINDS[kind](p, **storage) for p in (self.whole, self.params))

    def set_grads(self, seed):
        for i, grad in enumerate(set_grads(self.whole, seed)):
            self.params[i].grad = self.place[i](grad)

    def train(self, seeds):
        for seed in seeds:
            self.set_grads(seed)
            self.expected.step()
            self.optimizer.step()
        self.compare()

    def compare(self):
        """All is as with whole tensors, Muon bit for bit, Adafactor to the roundings of its sums."""
        steps = max(entry["step"].item() for entry in self.optimizer.state.values())
        alike(self)
        for p, q in zip(self.params, self.whole, strict=True):
            self.compare_one(p, q, steps, "weight")
            ours, theirs = kept(self.optimizer.state[p]), kept(self.expected.state[q])
            assert ours.keys() == theirs.keys()
            for name, value in ours.items():
                self.compare_one(value, theirs[name], steps, name)

    def compare_one(self, got, wanted, steps, name):
        got = whole(got)
        if self.kind == "muon":
            assert bits(got) == bits(wanted), name
            return
        # Two orders of a sum of n <= 60 positive terms differ by at most 2 * 60 roundings. An update is a
        # product of roots of five: of a row, a column, their mean, two norms. It is at most lr * norm(w): the
        # rate is lr * norm(w) / sqrt(n), and the clipped quotient's norm is at most sqrt(n).
        rounding = steps * 2 * MOST * unit(torch.float64 if self.dtype == torch.float64 else torch.float32)
        flips = self.flips * unit(got.dtype) if got.dtype.itemsize == 2 else 0.0
        size = wanted.float().norm().item() if name in ("weight", "master") else 0.0
        torch.testing.assert_close(got, wanted, rtol=rounding + flips, atol=5 * rounding * LR * size)


def tensors_of(world):
    """Weights and states, by name."""
    tensors = {}
    for i, p in enumerate(world.params):
        tensors |= {f"{i} {name}": value for name, value in kept(world.optimizer.state.get(p, {})).items()}
        tensors[f"{i} weight"] = p.detach()
    return tensors


def everything(world):
    """The bits that this rank has of weights and states."""
    return {name: bits(local(value)) for name, value in tensors_of(world).items()}


def alike(world):
    """Ranks that hold the same part of a tensor have the same bits."""
    mine, places = everything(world), {}
    for name, value in tensors_of(world).items():
        places[name] = [mesh.get_coordinate()[dim] for mesh, dim in split_over(value)]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (places, mine))
    for name, place in places.items():
        same = [theirs[name] for others, theirs in everyone if others[name] == place]
        assert all(values == mine[name] for values in same)


class Traffic:
    """Counts what this rank sends to others by all-to-alls, and the all-reduces of sums and their bytes."""

    def __enter__(self):
        self.sent, self.reduced = 0, []
        self._before = dist.all_to_all_single, dist.all_reduce
        dist.all_to_all_single, dist.all_reduce = self._exchange, self._reduce
        return self

    def __exit__(self, *exception):
        dist.all_to_all_single, dist.all_reduce = self._before

    def _exchange(self, output, value, into, out, group, async_op):
        assert value.dtype == torch.uint8
        self.sent += sum(out) - out[dist.get_rank(group)]
        return self._before[0](output, value, into, out, group=group, async_op=async_op)

    def _reduce(self, tensor, **options):
        self.reduced.append(tensor.nbytes)
        return self._before[1](tensor, **options)
