"""What all step ops share: their docstring, their checks, and the call itself."""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor

from . import checks
from .call import bump, call

Tensors = Sequence[Tensor]
Wrapper = TypeVar("Wrapper", bound=Callable[..., None])
FOLLOW = "and the 2 B that see whether the weight was modified"  # of the cost of a step with masters
OPTIONAL = ("masters", "max_exp_avg_sqs", "momentum_buffers")  # lists that may be empty, if the op agrees


class Shared(TypedDict, total=False):
    """What every step op takes besides its own arguments."""

    maximize: bool
    inv_scale: Tensor | None
    clip_coef: Tensor | None
    found_inf: Tensor | None
    scales: Tensors
    seeds: Sequence[int]
    stochastic_rounding: bool


_STEP_DOC = """One in-place {title} step over lists of tensors; changes nothing where ``found_inf`` is not 0.

    Arithmetic in fp32 (fp64 for fp64 parameters). {formula}

    Args:
        params (list of tensors, any shape, fp16|bf16|fp32|fp64): rewritten; with masters, = round(master) to
            nearest even.
        grads (as ``params``, any of the dtypes; fp64 for fp64 params only): read only, still multiplied by
            the loss scale.
        {states} (as ``params``, fp32; fp64 for fp64 params): rewritten. Or, to save memory, all states of a
            parameter bf16, rounded stochastically; or 8-bit codes: uint8 of states that are never negative,
            int8 of others.
        masters (as ``params``, fp32; one per parameter, all of them fp16 or bf16; or empty): rewritten.
            Where a weight is not its master rounded, the weight was modified, and the master follows it
            before the step: it keeps what it has below half a unit, where that fits the new weight. Or
            int16: what a split master has beyond its weight, which is then the master rounded with ties away
            from zero (bf16), or to nearest even (fp16).
        steps (list of 1-element fp32 tensors): how many steps each parameter has taken; incremented, from
            2^24 on to the next number that fp32 has. Whole numbers from 0 to 2^62; the CPU refuses others.
        lr (float, or 1 element fp32|fp64, on the CPU or on the same device): learning rate.
        inv_scale, clip_coef (1 element, fp32): the gradient enters as ``g * (inv_scale * clip_coef)``; None
            stands for 1.
        found_inf (1 element, fp32): not 0 means skip; None means no check.
        scales (list of contiguous fp32 tensors, in the order of the states): of 8-bit states, one for each
            128 neighbours in memory; rewritten.
        seeds (list of int, one per parameter; default: its index): random numbers are a function of seed,
            step count and place, on every device.
        stochastic_rounding: round 16-bit weights without masters stochastically.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: {cost}; no host sync.  Source: {source}.
    """


def documented(**parts: str) -> Callable[[Wrapper], Wrapper]:
    """Gives a step op's wrapper its docstring."""

    def decorate(function: Wrapper) -> Wrapper:
        function.__doc__ = _STEP_DOC.format(**parts)
        return function

    return decorate


def need_momentum_buffers(op: str, params: Tensors, momentum_buffers: Tensors, momentum: float) -> None:
    """Raise unless there is a buffer for each parameter with momentum, and none without."""
    checks.need_lists(op, params=params, momentum_buffers=momentum_buffers)
    has_momentum = checks.number(f"[{op}]", "momentum", momentum) != 0.0
    if (len(momentum_buffers) > 0) != (has_momentum and len(params) > 0):
        raise ValueError(
            f"[{op}] momentum_buffers has {len(momentum_buffers)} tensors with momentum={momentum}; expected "
            "one per param with momentum, none without"
        )


def run_step(
    op: str,
    params: Tensors,
    grads: Tensors,
    masters: Tensors,
    states: Mapping[str, Tensors],
    steps: Tensors,
    lr: float | Tensor,
    hyper: dict[str, Any],
    shared: Shared,
) -> None:
    """A step op as a wrapper calls it. ``hyper``: by name, in the order of csrc/math's Hyper."""
    unknown = shared.keys() - Shared.__annotations__.keys()
    if unknown:
        raise TypeError(f"{op}() got unexpected keyword arguments {sorted(unknown)}")
    scales, seeds = shared.pop("scales", ()), shared.pop("seeds", ())
    checks.need_lists(op, params=params)
    device = params[0].device if params and isinstance(params[0], Tensor) else None
    scalars = step_scalars(op, device, lr, hyper, **shared)  # type: ignore[misc]  # these two are not in it
    step_lists(op, params, grads, masters, states, steps, scalars, scales, seeds)


class StepCall(NamedTuple):
    """One call of a step op: what :func:`step_lists` takes."""

    op: str
    params: Sequence[Tensor]
    grads: Sequence[Tensor]
    masters: Tensors
    states: Mapping[str, Sequence[Tensor]]
    """By the names that the caller knows."""
    steps: Tensors
    scalars: dict[str, Any]
    """From :func:`step_scalars`."""
    scales: Tensors = ()
    seeds: Sequence[int] = ()

    def states_in_order(self) -> list[Tensor]:
        return [state for tensors in self.states.values() for state in tensors]

    def named_states(self) -> list[str]:
        """The names of :meth:`states_in_order`."""
        return [f"{name}[{i}]" for name, tensors in self.states.items() for i in range(len(tensors))]


def step_lists(
    op: str,
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    masters: Tensors,
    states: Mapping[str, Sequence[Tensor]],
    steps: Tensors,
    scalars: dict[str, Any],
    scales: Tensors = (),
    seeds: Sequence[int] = (),
) -> None:
    """Any step op. ``states`` by the names that the caller knows; ``scalars`` from :func:`step_scalars`."""
    step = StepCall(op, params, grads, masters, states, steps, scalars, scales, seeds)
    if _call(op, step):
        bump(params, masters, step.states_in_order(), steps, scales)


def check_steps(calls: Sequence[StepCall]) -> None:
    """Raises what one of ``calls`` would be refused for, or all of them together; changes nothing.

    After it they can be made one after the other, and none is refused when others have written already.
    Together they may share no memory that one of them writes: a gradient that is a view of another call's
    weight would be read after it has changed.

    Raises: as the ops; ValueError naming both tensors where two calls share memory that one of them writes.
    Cost: the ops' checks on the host, about 1 us per parameter; no host sync.
    """
    for step in calls:
        _call("_check_step", step, op=step.op)
    check_memory(calls)


def check_memory(calls: Sequence[StepCall]) -> None:
    """Raises where two tensors of ``calls`` share memory that one of them writes; changes nothing."""
    by_device: dict[torch.device, tuple[list[_Place], list[_Place]]] = {}
    for c, step in enumerate(calls):
        if step.params:
            written, read = by_device.setdefault(step.params[0].device, ([], []))
            written += [_Place(t, step.op, c, name) for name, t in _written(step)]
            read += [_Place(t, step.op, c, f"grads[{i}]") for i, t in enumerate(step.grads)]
    for written, read in by_device.values():
        places = written + read
        one, two = call("_find_shared_memory", [place.tensor for place in places], len(written))
        if one >= 0:
            a, b = places[one], places[two]
            raise ValueError(
                f"[{a.op}] {a.name} of call {a.call} (shape {list(a.tensor.shape)}) shares memory with "
                f"{b.name} of call {b.call} ({b.op}); expected memory of its own for all that the calls "
                "write. Pass each tensor once, or a clone()"
            )


class _Place(NamedTuple):
    tensor: Tensor
    op: str
    call: int
    name: str


def _written(step: StepCall) -> Iterator[tuple[str, Tensor]]:
    """What a step writes, by name."""
    for name in ("params", "masters", "steps", "scales"):
        yield from ((f"{name}[{i}]", tensor) for i, tensor in enumerate(getattr(step, name)))
    yield from zip(step.named_states(), step.states_in_order(), strict=True)


def _call(name: str, step: StepCall, **more: str) -> bool:
    """Calls a step op, or the one that checks for it; whether there was anything to do."""
    op, params = step.op, step.params
    checks.need_lists(
        op,
        params=params,
        grads=step.grads,
        **step.states,
        masters=step.masters,
        steps=step.steps,
        scales=step.scales,
    )
    checks.need_seeds(op, step.seeds)
    lengths = dict(grads=step.grads, **step.states, masters=step.masters, steps=step.steps)
    for list_name, tensors in lengths.items():
        if len(tensors) != len(params) and (tensors or list_name not in OPTIONAL):
            raise ValueError(
                f"[{op}] {list_name} has {len(tensors)} tensors; expected {len(params)}, one per param"
                f"{', or none at all' if list_name == 'masters' else ''}"
            )
    if not params:
        return False
    lists = (params, step.grads, step.masters, step.states_in_order(), step.steps, step.scales)
    try:
        call(name, *lists, **step.scalars, seeds=step.seeds, **more)
    except (TypeError, ValueError) as error:
        # The op has one list of states; the caller knows them by name.
        names = step.named_states()
        text = re.sub(r"\bstates\[(\d+)\]", lambda match: names[int(match[1])], str(error))
        raise type(error)(text) from error.__cause__
    return True


def step_scalars(
    op: str,
    device: torch.device | None,
    lr: float | Tensor,
    hyper: dict[str, Any],
    maximize: bool = False,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
) -> dict[str, Any]:
    """The keyword arguments that every step op has.

    ``hyper``: by name, in the order of csrc/math's Hyper. ``device``: the parameters'.
    """
    lr_tensor = None
    if isinstance(lr, Tensor) and device is not None:
        if lr.device == device or lr.device.type != "cpu" or lr.numel() != 1:
            lr, lr_tensor = 0.0, lr
        else:
            lr = lr.item()  # reading a CPU tensor waits for nothing
    where = f"[{op}]"
    return dict(
        lr=checks.number(where, "lr", lr),
        hyper=[
            value if type(value) is float else checks.number(where, name, value, flags=True)
            for name, value in hyper.items()
        ],
        maximize=checks.flag(where, "maximize", maximize),
        lr_tensor=lr_tensor,
        inv_scale=inv_scale,
        clip_coef=clip_coef,
        found_inf=found_inf,
        stochastic_rounding=checks.flag(where, "stochastic_rounding", stochastic_rounding),
    )
