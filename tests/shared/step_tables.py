"""Tables of a step as the engines have them (csrc/engine/table.h): rows, gradients, groups."""

import struct
from dataclasses import dataclass, field

import torch
from torch import Tensor

CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
    torch.int8: 4,
    torch.uint8: 4,  # the rule knows the sign
    torch.int16: 6,
}


@dataclass
class Group:
    """The arguments of one step op, by its names."""

    op: str
    params: list[Tensor]
    grads: list[Tensor]
    masters: list[Tensor]
    states: list[Tensor]
    steps: list[Tensor]
    scales: list[Tensor] = field(default_factory=list)
    lr: float = 0.1
    hyper: list[float] = field(default_factory=list)
    maximize: bool = False
    lr_tensor: Tensor | None = None
    seeds: list[int] = field(default_factory=list)
    stochastic_rounding: bool = False

    def lists(self) -> tuple[list[Tensor], ...]:
        return self.params, self.grads, self.masters, self.states, self.steps, self.scales

    def copy(self) -> "Group":
        return Group(
            self.op,
            *([t.clone() for t in tensors] for tensors in self.lists()),
            *(self.lr, self.hyper, self.maximize, self.lr_tensor, self.seeds, self.stochastic_rounding),
        )

    def step(self, **scalars: Tensor) -> None:
        """By the public op."""
        getattr(torch.ops.fusedamp, self.op)(
            *self.lists(),
            lr=self.lr,
            hyper=self.hyper,
            maximize=self.maximize,
            lr_tensor=self.lr_tensor,
            seeds=self.seeds,
            stochastic_rounding=self.stochastic_rounding,
            **scalars,
        )

    def changed(self) -> list[Tensor]:
        return [t for tensors in self.lists() for t in tensors]

    def row(self, i: int, group: int) -> bytes:
        n, per_param = len(self.params), len(self.states) // len(self.params)
        states = [self.states[j * n + i] for j in range(per_param)]
        scales = [self.scales[k] for k in range(i, len(self.scales), n)]
        master = self.masters[i] if self.masters else None
        address = [0 if t is None else t.data_ptr() for t in (self.params[i], master)]
        for tensors in (states, scales):
            address += [t.data_ptr() for t in tensors] + [0] * (3 - len(tensors))
        dtypes = [t.dtype for t in (self.grads[i], self.params[i])]
        dtypes += [torch.float32 if master is None else master.dtype]
        dtypes += [
            states[0].dtype if states and states[0].numel() == self.params[i].numel() else torch.float32
        ]
        tail = struct.pack("=i6B6x", group, *map(CODES.get, dtypes), self.maximize, self.stochastic_rounding)
        seed = self.seeds[i] if self.seeds else i
        numbers = self.steps[i].data_ptr(), 0, self.params[i].numel(), seed, 0, 0, 0
        return struct.pack("=15q", *address, *numbers) + tail


def table(packed: bytes, words: int) -> Tensor:
    flat = (
        torch.frombuffer(bytearray(packed), dtype=torch.int64)
        if packed
        else torch.zeros(0, device="cpu").long()
    )
    return flat.view(-1, words)


def rows_of(groups: list[Group]) -> Tensor:
    return table(b"".join(g.row(i, k) for k, g in enumerate(groups) for i in range(len(g.params))), 17)


def grads_of(groups: list[Group]) -> Tensor:
    return torch.tensor([t.data_ptr() for g in groups for t in g.grads], dtype=torch.int64, device="cpu")


def groups_of(groups: list[Group]) -> Tensor:
    packed, first = b"", 0
    for g in groups:
        rule = torch.ops.fusedamp._rule_of(g.op, len(g.states) // len(g.params))
        hyper = [*g.hyper, *[0.0] * (8 - len(g.hyper))]
        lr = 0 if g.lr_tensor is None else g.lr_tensor.data_ptr()
        packed += struct.pack("=9d3q", *hyper, g.lr, lr, first, len(g.params))
        packed += struct.pack("=iB3x", rule, 2 if g.lr_tensor is None else CODES[g.lr_tensor.dtype])
        first += len(g.params)
    return table(packed, 13)


def planned_step(groups: list[Group], **scalars: Tensor) -> None:
    like = groups[0].params[0]
    rows, tables = rows_of(groups), groups_of(groups)
    torch.ops.fusedamp._check_plan(rows, tables, like)
    torch.ops.fusedamp._planned_step_(rows, grads_of(groups), tables, like, **scalars)
