"""Calls of the ops, ready to run: arguments of every op, dtype and layout, guard elements, comparison to the
bit."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import reference
import torch
from fusedamp import ops
from fusedamp.ops import recode
from tolerances import EXACT, Rounded, unit
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
DTYPES = (*HALVES, torch.float32, torch.float64)
ROUNDOFF = {
    torch.float16: 2.0**-11,
    torch.bfloat16: 2.0**-8,
    torch.float32: 2.0**-24,
    torch.float64: 2.0**-53,
}
BORDERS = (
    1,
    7,
    63,
    64,
    65,
    511,
    512,
    513,
    1025,
    32767,
    32768,
    32769,
    65537,
)  # around lanes, blocks and chunks


def split_masters(masters: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """FP32 masters as 16-bit weights and int16 remainders."""
    weight, remainder = masters.to(dtype), torch.empty_like(masters, dtype=torch.int16)
    recode.split_master_(weight, masters, remainder)
    return weight, remainder


_ADAM = dict(lr=0.03, betas=(0.9, 0.99), eps=0.05, weight_decay=0.3)
_SGD = dict(lr=0.03, momentum=0.9, dampening=0.25, weight_decay=0.3)
_LION = dict(lr=0.03, betas=(0.9, 0.99), weight_decay=0.3)
_LARS = dict(lr=0.3, momentum=0.9, weight_decay=0.3, trust_coefficient=0.1, eps=0.05)
_RMSPROP = dict(lr=0.03, alpha=0.9, eps=0.05, weight_decay=0.3)
VARIANTS: dict[str, tuple[str, dict]] = {
    "adamw": ("adamw_", _ADAM),
    "adamw-amsgrad": ("adamw_", _ADAM | dict(amsgrad=True)),
    "adamw-maximize": ("adamw_", _ADAM | dict(maximize=True)),
    "adam": ("adam_", _ADAM),
    "adam-amsgrad": ("adam_", _ADAM | dict(amsgrad=True)),
    "adam-maximize": ("adam_", _ADAM | dict(maximize=True)),
    "sgd": ("sgd_", dict(lr=0.03, weight_decay=0.3)),
    "sgd-maximize": ("sgd_", dict(lr=0.03, weight_decay=0.3, maximize=True)),
    "sgd-momentum": ("sgd_", _SGD),
    "sgd-nesterov": ("sgd_", _SGD | dict(dampening=0.0, nesterov=True)),
    "sgd-nesterov-maximize": ("sgd_", _SGD | dict(dampening=0.0, nesterov=True, maximize=True)),
    "lion": ("lion_", _LION),
    "lion-maximize": ("lion_", _LION | dict(maximize=True)),
    "adagrad": ("adagrad_", dict(lr=0.03, lr_decay=0.2, eps=0.05, weight_decay=0.3)),
    "rmsprop": ("rmsprop_", _RMSPROP),
    "rmsprop-momentum": ("rmsprop_", _RMSPROP | dict(momentum=0.9)),
    "rmsprop-centered": ("rmsprop_centered_", _RMSPROP),
    "rmsprop-centered-momentum": ("rmsprop_centered_", _RMSPROP | dict(momentum=0.9)),
    "radam": ("radam_", _ADAM),
    "radam-decoupled": ("radam_", _ADAM | dict(decoupled_weight_decay=True)),
    "nadam": ("nadam_", _ADAM | dict(momentum_decay=0.1)),
    "nadam-decoupled": ("nadam_", _ADAM | dict(decoupled_weight_decay=True)),
    "lamb": ("lamb_", _ADAM),
    "lamb-uncorrected": ("lamb_", _ADAM | dict(bias_correction=False, trust_clip=0.5)),
    "lars": ("lars_", _LARS),
    "lars-nesterov": ("lars_", _LARS | dict(nesterov=True, maximize=True)),
    "novograd": ("novograd_", _ADAM),
    "novograd-averaging": ("novograd_", _ADAM | dict(grad_averaging=True)),
}
_MOMENTS = ["exp_avgs", "exp_avg_sqs"]
STATE_NAMES = {
    "adamw_": [*_MOMENTS, "max_exp_avg_sqs"],
    "adam_": [*_MOMENTS, "max_exp_avg_sqs"],
    "sgd_": ["momentum_buffers"],
    "lion_": ["exp_avgs"],
    "adagrad_": ["sums"],
    "rmsprop_": ["square_avgs", "momentum_buffers"],
    "rmsprop_centered_": ["square_avgs", "grad_avgs", "momentum_buffers"],
    "radam_": _MOMENTS,
    "nadam_": [*_MOMENTS, "mu_products"],
    "lamb_": _MOMENTS,
    "lars_": ["momentum_buffers"],
    "novograd_": _MOMENTS,
}
REFERENCES: dict[str, Callable] = {
    "adamw_": reference.adamw,
    "adam_": reference.adam,
    "sgd_": reference.sgd,
    "lion_": reference.lion,
    "adagrad_": reference.adagrad,
    "rmsprop_": reference.rmsprop,
    "rmsprop_centered_": partial(reference.rmsprop, centered=True),
    "radam_": reference.radam,
    "nadam_": reference.nadam,
    "lamb_": reference.lamb,
    "lars_": reference.lars,
    "novograd_": reference.novograd,
}
NEEDS = {"max_exp_avg_sqs": "amsgrad", "momentum_buffers": "momentum"}  # lists that an option brings
SCALARS = {("nadam_", "mu_products"), ("novograd_", "exp_avg_sqs")}  # one fp64 element per parameter
LAYERWISE = (
    "lamb_",
    "lars_",
    "novograd_",
)  # ops that know norms, whose last bits depend on the order of memory
SQUARES = {"exp_avg_sqs", "max_exp_avg_sqs", "sums", "square_avgs"}  # never negative


def scalar(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.tensor(value, dtype=dtype)


def bits(t: Tensor) -> Tensor:
    return t.detach().view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()])


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(bits(a), bits(b))


def same_numbers(a: Tensor, b: Tensor) -> bool:
    """Bitwise equal, except that every NaN equals every other."""
    nan = a.isnan()
    return a.dtype == b.dtype and torch.equal(nan, b.isnan()) and torch.equal(bits(a)[~nan], bits(b)[~nan])


class Unchanged:
    """``with Unchanged(tensors): ...`` asserts that not one of their bits changed."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self.tensors, self.before = tensors, [t.detach().clone() for t in tensors]

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        for i, (now, before) in enumerate(zip(self.tensors, self.before, strict=True)):
            assert torch.equal(bits(now), bits(before)), f"tensor {i} of shape {tuple(now.shape)} was changed"


@dataclass
class StepCall:
    """The arguments of one step op."""

    op: str
    params: list[Tensor]
    grads: list[Tensor]
    states: list[list[Tensor]]
    masters: list[Tensor]
    steps: list[Tensor]
    options: dict = field(default_factory=dict)

    def run(self) -> None:
        getattr(ops, self.op)(self.params, self.grads, *self.states, self.masters, self.steps, **self.options)

    def lists(self) -> dict[str, list[Tensor]]:
        states = dict(zip(STATE_NAMES[self.op], self.states, strict=True))
        return dict(params=self.params, grads=self.grads, **states, masters=self.masters, steps=self.steps)

    def tensors(self) -> list[Tensor]:
        return [t for tensors in self.lists().values() for t in tensors]

    def exact_tensors(self) -> list[Tensor]:
        """Those that get the same bits in every order of memory and on every device: of ops that know norms,
        what is not FP64.
        """
        if self.op not in LAYERWISE:
            return self.tensors()
        return [t for t in self.tensors() if t.dtype != torch.float64]

    def map(
        self, change: Callable[[Tensor], Tensor], scalars: Callable[[Tensor], Tensor] = torch.clone
    ) -> "StepCall":
        """The same call with every params-like tensor replaced by ``change``, and every scalar and step by
        ``scalars``.
        """
        new = {name: [change(t) for t in getattr(self, name)] for name in ("params", "grads", "masters")}
        states = [
            list(map(scalars if (self.op, name) in SCALARS else change, one))
            for name, one in zip(STATE_NAMES[self.op], self.states, strict=True)
        ]
        steps = list(map(scalars, self.steps))
        return replace(self, **new, states=states, steps=steps, options=dict(self.options))

    def clone(self) -> "StepCall":
        return self.map(torch.clone)


def step_call(
    variant: str,
    shapes: Sequence[Sequence[int]],
    dtypes: torch.dtype | Sequence[torch.dtype],
    *,
    masters: bool = False,
    grad_dtype: torch.dtype | None = None,
    taken: Sequence[int] = (3,),
    seed: int = 0,
    **options: object,
) -> StepCall:
    """A random call. dtypes and taken (steps taken so far) are cycled through over the tensors."""
    op, defaults = VARIANTS[variant]
    random = torch.Generator().manual_seed(seed)
    each = [dtypes] if isinstance(dtypes, torch.dtype) else list(dtypes)
    each = [each[i % len(each)] for i in range(len(shapes))]

    def normal(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=random, dtype=torch.float64).to(dtype)

    call = StepCall(op, [], [], [[] for _ in STATE_NAMES[op]], [], [], defaults | options)
    for i, (shape, dtype) in enumerate(zip(shapes, each, strict=True)):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        master = normal(shape, wide)
        call.params.append(master.to(dtype))
        if masters:
            call.masters.append(master)
        call.grads.append(normal(shape, grad_dtype or dtype))
        for name, states in zip(STATE_NAMES[op], call.states, strict=True):
            if name in NEEDS and not call.options.get(NEEDS[name]):
                continue
            if (op, name) in SCALARS:
                states.append(torch.rand((), generator=random, dtype=torch.float64) * 0.9)
                continue
            state = normal(shape, wide)
            # More than the square of any mean, because it may be the variance's mean square.
            states.append(state.square() + 2.0 if name in SQUARES else state.clamp(-4, 4) * 0.3)
        call.steps.append(scalar(float(taken[i % len(taken)])))
    return call


def expected(call: StepCall, index: int) -> tuple[Rounded, list[Rounded]]:
    """Returns what ``reference.py`` makes of tensor ``index`` of a call that has not run yet: the master (the
    weight if there is none), and the states.
    """
    options = dict(call.options, lr=float(call.options["lr"]))
    options.pop("found_inf", None)
    factors = [options.pop(name, None) for name in ("inv_scale", "clip_coef")]
    inv_scale, clip_coef = (scalar(1.0) if factor is None else factor for factor in factors)
    p = (call.masters or call.params)[index]
    u = EXACT if p.dtype == torch.float64 else unit(torch.float32)
    g = call.grads[index].double() * (inv_scale * clip_coef).double()
    state: dict = {"step": int(call.steps[index])}
    names = []
    for name, tensors in zip(STATE_NAMES[call.op], call.states, strict=True):
        if tensors:
            names.append(name.removesuffix("s"))
            value = tensors[index].double()
            state[names[-1]] = Rounded(value, 0 * value, EXACT if (call.op, name) in SCALARS else u)
    old_p = Rounded(p.double(), 0 * p.double(), u)
    new_p = REFERENCES[call.op](old_p, Rounded(g, u * g.abs(), u), state, **options)
    # RAdam's rate: a difference of powers, made in FP64.
    new_p.error = new_p.error + EXACT * state.get("condition", 0.0) * (new_p.value - old_p.value).abs()
    if call.op == "nadam_":  # a power of as many factors as there are steps, and products
        state["mu_product"].error = (state["step"] + 9) * EXACT * state["mu_product"].value
    if call.op == "novograd_":  # the roundings of a long sum of squares
        state["exp_avg_sq"].error += 64 * EXACT * state["exp_avg_sq"].value
    return new_p, [state[name] for name in names]


def guarded(t: Tensor, offset: int = 0) -> tuple[Tensor, Callable[[], bool]]:
    """A copy of ``t``, same strides, `offset` elements off alignment in a larger buffer; and: are its
    surroundings intact?"""
    room = 64
    buffer = torch.empty(t.numel() + offset + 2 * room, dtype=t.dtype)
    bits(buffer).fill_(0x2BAD)
    start, end = room + offset, room + offset + t.numel()
    view = buffer.as_strided(t.shape, t.stride(), start)
    view.copy_(t)
    guards = bits(buffer)
    return view, lambda: bool((guards[:start] == 0x2BAD).all() and (guards[end:] == 0x2BAD).all())
