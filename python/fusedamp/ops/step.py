"""The call of a step op: its hyper-parameters by name, its checks, and the call itself."""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import checks, library
from .call import bump, call

Tensors = Sequence[Tensor]
OPTIONAL = ("masters", "max_exp_avg_sqs", "momentum_buffers")  # lists that may be empty, if the op agrees

# Hyper-parameters that callers give by another name; the others have one name.
_GIVEN_AS = {
    "beta1": "betas[0]",
    "beta2": "betas[1]",
    "decoupled": "decoupled_weight_decay",
    "decay_base": "momentum_decay",  # 0.96 to the power of it
}
# What the caller names, in the order of the op's ``hyper`` (csrc/math/optimizers.def).
HYPER: dict[str, tuple[str, ...]] = {
    op: tuple([_GIVEN_AS.get(name, name) for name in torch.ops.fusedamp._hyper_names(op).split()])
    for op in library.STEP_OPS
}


def options_of(op: str) -> tuple[str, ...]:
    """Returns the options that are the hyper-parameters of a step op, in its order; ``betas`` is two."""
    return tuple(dict.fromkeys(name.partition("[")[0] for name in HYPER[op]))


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
    places: Sequence[int] = ()
    """Three numbers per parameter, or none; see :class:`fusedamp.tensors.places.Place`."""
    squares: Tensor | None = None
    """From :func:`measure`, added up over ranks."""
    updates: Tensor | None = None
    due: Tensor | None = None

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
    places: Sequence[int] = (),
    squares: Tensor | None = None,
    updates: Tensor | None = None,
    due: Tensor | None = None,
) -> None:
    """Any step op. ``states`` by the names that the caller knows; ``scalars`` from :func:`step_scalars`."""
    step = StepCall(
        op, params, grads, masters, states, steps, scalars, scales, seeds, places, squares, updates, due
    )
    if _call(op, step):
        bump(params, masters, step.states_in_order(), steps, scales, () if updates is None else (updates,))


def measure(step: StepCall) -> Tensor:
    """Return what a step op with norms measures first: FP64 [params, 2], sums of squares over its tensors.

    Of shards, the sums over all ranks are the ``squares`` of the step. 0 if ``found_inf`` is not 0. FP32
    masters of modified weights may follow them already here.
    Cost: reads what the step reads; no host sync.
    """
    scalars = {name: value for name, value in step.scalars.items() if name != "stochastic_rounding"}
    lists = (step.params, step.grads, step.masters, step.states_in_order(), step.steps, step.scales)
    squares: Tensor = call("_measure_", *lists, op=step.op, **scalars)
    bump(step.masters)
    return squares


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
            if step.due is not None:
                read.append(_Place(step.due, step.op, c, "due"))
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
    if step.updates is not None:
        yield "updates", step.updates


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
    checks.need_whole_numbers(op, "seeds", step.seeds)
    checks.need_whole_numbers(op, "places", step.places)
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
    placed: dict[str, Any] = dict(seeds=step.seeds, places=step.places, squares=step.squares)
    tally = {"updates": step.updates, "due": step.due}
    placed |= {name: tensor for name, tensor in tally.items() if tensor is not None}
    try:
        call(name, *lists, **step.scalars, **more, **placed)
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
    hyper: Mapping[str, Any],
    maximize: bool = False,
    inv_scale: Tensor | None = None,
    clip_coef: Tensor | None = None,
    found_inf: Tensor | None = None,
    stochastic_rounding: bool = False,
) -> dict[str, Any]:
    """Returns the keyword arguments that every step op has.

    ``hyper``: by the names and in the order of ``HYPER[op]``. ``device``: the parameters'.
    Raises: TypeError naming the op, where a hyper-parameter is missing, misplaced or no number.
    """
    where, wanted = f"[{op}]", HYPER.get(op, ())
    if tuple(hyper) != wanted:
        raise TypeError(f"{where} hyper-parameters are {list(hyper)}; expected {list(wanted)}, in this order")
    numbers = []
    for name, value in hyper.items():
        number = value if type(value) is float else checks.number(where, name, value, flags=True)
        numbers.append(0.96**number if name == "momentum_decay" else number)
    lr_tensor = None
    if isinstance(lr, Tensor) and device is not None:
        if lr.device == device or lr.device.type != "cpu" or lr.numel() != 1:
            lr, lr_tensor = 0.0, lr
        else:
            lr = lr.item()  # reading a CPU tensor waits for nothing
    return dict(
        lr=checks.number(where, "lr", lr),
        hyper=numbers,
        maximize=checks.flag(where, "maximize", maximize),
        lr_tensor=lr_tensor,
        inv_scale=inv_scale,
        clip_coef=clip_coef,
        found_inf=found_inf,
        stochastic_rounding=checks.flag(where, "stochastic_rounding", stochastic_rounding),
    )
