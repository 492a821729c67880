"""Makes a step op of :mod:`fusedamp.ops` from the signature that declares it."""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypedDict, TypeVar, cast

from torch import Tensor

from . import checks
from .step import Tensors, options_of, step_lists, step_scalars

Declared = TypeVar("Declared", bound=Callable[..., None])
Scalars = Annotated[Tensors, "one fp64 element per parameter"]
Rate = float | Tensor
Betas = tuple[float, float]


class Shared(TypedDict, total=False):
    """What every step op takes besides its own arguments."""

    maximize: bool
    inv_scale: Tensor | None
    clip_coef: Tensor | None
    found_inf: Tensor | None
    scales: Tensors
    seeds: Sequence[int]
    places: Sequence[int]
    stochastic_rounding: bool
    updates: Tensor | None
    due: Tensor | None


_STEP_DOC = """One in-place {title} step over lists of tensors; changes nothing where ``found_inf`` is not 0.

    Arithmetic in fp32 (fp64 for fp64 parameters). {formula}

    Args:
        params (list of tensors, any shape, fp16|bf16|fp32|fp64): rewritten; with masters, = round(master) to
            nearest even.
        grads (as ``params``, any of the dtypes; fp64 for fp64 params only): read only, still multiplied by
            the loss scale.
        {states} (as ``params``, fp32; fp64 for fp64 params{without}): rewritten.
            Or, to save memory, all states of a parameter bf16, rounded stochastically; or 8-bit values: uint8
            of states that are never negative, int8 of others.
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
            128 neighbors in memory; rewritten.
        seeds (list of int, one per parameter; its index by default): random numbers are a function of seed,
            step count and place, on every device.
        places (list of int, three per parameter; default: whole tensors): of a shard's elements in the whole
            tensor, whose random numbers they take: ``first``, ``run``, ``stride``. Element i is element
            ``i // run * stride + first + i % run`` of the whole; with ``run`` 0, ``first + i``.
        stochastic_rounding: round 16-bit weights without masters stochastically.
        updates (contiguous fp64 [n, 4] for n parameters): what the step changes, rewritten if it is due and
            taken. Columns: moved, lost, sum of (new - old)^2, sum of old^2. old and new are the values that
            the step computes with: masters, after they have followed modified weights; without masters, the
            weight before, and the value before it is rounded to the weight after. moved: elements with
            new != old (NaN counts). lost: those of them where ``w16 + (new - old)``, in fp32, rounds to
            nearest even to the bits of w16, the 16-bit weight that the step found (NaN is never lost): what
            a 16-bit weight alone would not feel. 0 for fp32 and fp64 weights. With masters nothing is lost;
            without them, stochastic rounding keeps such updates on average. Sums are in fp64, of fp32
            differences; CPU and CUDA agree on counts, and on sums but for their last bits.
        due (1 element, int32): not 0 means that ``updates`` is due; None means always. Refused without
            ``updates``.
    Raises: ValueError naming the op, the index, what it got, what it wanted.
    Cost: {cost}; no host sync.
    Source: {source}.
    """


def step_op(
    title: str, formula: str, cost: str, source: str, last_state_with: str | None = None
) -> Callable[[Declared], Declared]:
    """Make the step op that the decorated signature declares, with its docstring.

    The signature names the lists (params, grads, the states, masters, steps) and, after ``lr``, the options
    with types and defaults. They are the op's hyper-parameters, as :func:`options_of` names them. Callers,
    help() and type checkers see this signature.

    Args:
        title, formula, cost, source: of the docstring.
        last_state_with: the option that brings the last list of states, which is empty without it.
    Raises: ImportError where the options are not those of the compiled op.
    """

    def decorate(declared: Declared) -> Declared:
        op, parameters = declared.__name__, inspect.signature(declared).parameters
        lists = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
        kinds = {name: p.annotation for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
        defaults = {name: parameters[name].default for name in kinds}
        states, hyper, known = lists[2:-2], options_of(op), {*lists, *kinds, *Shared.__annotations__}
        if kinds.keys() != {"lr", *hyper, last_state_with} - {None}:
            raise ImportError(
                f"[{op}] is declared with {sorted(kinds)}; expected lr and {sorted(hyper)}, as compiled. "
                "Build fusedamp again."
            )

        @functools.wraps(declared)
        def run(*args: Tensors, **named: Any) -> None:
            declared(*args, **named)  # does nothing; Python says what is missing or given twice
            if unknown := named.keys() - known:
                raise TypeError(f"{op}() got unexpected keyword arguments {sorted(unknown)}")
            given = {**defaults, **dict(zip(lists, args, strict=False)), **named}
            params, lr = given["params"], given["lr"]
            checks.need_lists(op, params=params)
            if last_state_with is not None:
                _check_last_state(op, states[-1], last_state_with, kinds[last_state_with], given)
            numbers: dict[str, Any] = {}
            for name in hyper:
                numbers |= _numbers(op, name, kinds[name], given[name])
            shared = {name: given[name] for name in Shared.__annotations__ if name in named}
            more = {name: shared.pop(name, ()) for name in ("scales", "seeds", "places")}
            more |= {name: shared.pop(name, None) for name in ("updates", "due")}
            device = params[0].device if params and isinstance(params[0], Tensor) else None
            scalars = step_scalars(op, device, lr, numbers, **shared)
            by_name = {name: given[name] for name in states}
            step_lists(op, params, given["grads"], given["masters"], by_name, given["steps"], scalars, **more)

        whole = [name for name in states if parameters[name].annotation is not Scalars]
        without = f"; {whole[-1]}: empty without ``{last_state_with}``" if last_state_with else ""
        run.__doc__ = _STEP_DOC.format(
            title=title, formula=formula, states=", ".join(whole), without=without, cost=cost, source=source
        )
        return cast(Declared, run)

    return decorate


def _numbers(op: str, name: str, kind: Any, value: Any) -> dict[str, Any]:
    """The hyper-parameters that an option is, by the names that messages call them."""
    if kind is Betas:
        return {f"{name}[{i}]": beta for i, beta in enumerate(checks.numbers(f"[{op}]", name, value))}
    return {name: checks.flag(f"[{op}]", name, value) if kind is bool else value}


def _check_last_state(op: str, state: str, option: str, kind: Any, given: dict[str, Any]) -> None:
    """Raise unless there is one of ``state`` for each parameter with ``option``, and none without."""
    params, tensors, value = given["params"], given[state], given[option]
    checks.need_lists(op, **{state: tensors})
    is_on = checks.flag if kind is bool else checks.number
    if (len(tensors) > 0) != (bool(is_on(f"[{op}]", option, value)) and len(params) > 0):
        raise ValueError(
            f"[{op}] {state} has {len(tensors)} tensors with {option}={value}; expected one per param with "
            f"{option}, none without"
        )
