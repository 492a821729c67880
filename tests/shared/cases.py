"""One row per optimizer and variant, read by tests and benchmarks.

``weight_decay`` is never 0: a decay that is wrong, or missing, must show in every row. For the same reason
``eps`` is large in some.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import reference
import tolerances
import torch
from fusedamp import optim
from fusedamp.optim.state.encoded import plain
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, its ``torch.optim`` namesake (if it has one) and its reference."""

    name: str
    ours: type[torch.optim.Optimizer]
    torch: type[torch.optim.Optimizer] | None
    reference: Callable
    states: tuple[str, ...]
    options: dict[str, Any]
    roundings: int  # per element and step, of the size of the update's terms (tolerances.py)
    terms: Callable[[Tensor, dict[str, Any], dict[str, Any]], Tensor]
    bitwise: bool = True  # whether every device gives the same bits; sums over a whole tensor may not
    scalars: tuple[str, ...] = ()  # states of one FP64 element per parameter
    kink: str = ""  # recorded value per element: where it is 0 within roundings, any result is valid

    def __str__(self) -> str:
        return self.name


def nonnegative_states(ours: type[torch.optim.Optimizer]) -> set[str]:
    """The names of the states that 8 bits hold without a sign."""
    return {spec.name for spec in ours.states if spec.nonnegative}


MOMENTS = ("exp_avg", "exp_avg_sq")
MAX_MOMENTS = (*MOMENTS, "max_exp_avg_sq")


def _adamw(name: str, states: tuple[str, ...] = MOMENTS, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return Case(
        name, optim.AdamW, torch.optim.AdamW, reference.adamw, states, options, 16, tolerances.adam_terms
    )


def _adam(name: str, states: tuple[str, ...] = MOMENTS, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return Case(
        name, optim.Adam, torch.optim.Adam, reference.adam, states, options, 16, tolerances.adam_terms
    )


def _sgd(name: str, states: tuple[str, ...] = ("momentum_buffer",), **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    return Case(name, optim.SGD, torch.optim.SGD, reference.sgd, states, options, 8, tolerances.sgd_terms)


def _lion(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    terms = tolerances.lion_terms
    return Case(name, optim.Lion, None, reference.lion, ("exp_avg",), options, 4, terms, kink="direction")


def _adagrad(name: str, **options: Any) -> Case:
    options = {"lr": 1e-1, "weight_decay": 0.1, **options}
    terms = tolerances.adagrad_terms
    return Case(name, optim.Adagrad, torch.optim.Adagrad, reference.adagrad, ("sum",), options, 24, terms)


def _rmsprop(name: str, *states: str, **options: Any) -> Case:
    options = {"lr": 1e-3, "weight_decay": 0.1, **options}
    names, terms = ("square_avg", *states), tolerances.rmsprop_terms
    return Case(name, optim.RMSprop, torch.optim.RMSprop, reference.rmsprop, names, options, 16, terms)


def _radam(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    terms = tolerances.radam_terms
    return Case(name, optim.RAdam, torch.optim.RAdam, reference.radam, MOMENTS, options, 16, terms)


def _adafactor(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, "eps": (1e-6, 1e-3), **options}
    names, terms = ("row_var", "col_var", "variance"), tolerances.adafactor_terms
    return Case(
        name,
        optim.Adafactor,
        None,
        reference.adafactor,
        names,
        options,
        tolerances.LONGEST_SUM + 40,
        terms,
        False,
    )


def _muon(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, "momentum": 0.9, "ns_dtype": torch.float64, **options}
    names, terms = ("momentum_buffer", *MOMENTS), tolerances.muon_terms
    return Case(name, optim.Muon, None, reference.muon, names, options, 16, terms, False)


def _nadam(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    names, terms = (*MOMENTS, "mu_product"), tolerances.nadam_terms
    ours, theirs, scalars = optim.NAdam, torch.optim.NAdam, ("mu_product",)
    return Case(name, ours, theirs, reference.nadam, names, options, 20, terms, scalars=scalars)


def _lamb(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    terms = tolerances.lamb_terms
    return Case(name, optim.LAMB, None, reference.lamb, MOMENTS, options, 24, terms, bitwise=False)


def _lars(name: str, **options: Any) -> Case:
    options = {"lr": 1e-1, "weight_decay": 0.1, "trust_coefficient": 0.1, **options}
    states, terms = ("momentum_buffer",), tolerances.lars_terms
    return Case(name, optim.LARS, None, reference.lars, states, options, 16, terms, bitwise=False)


def _novograd(name: str, **options: Any) -> Case:
    options = {"lr": 1e-2, "weight_decay": 0.1, **options}
    names, terms = MOMENTS, tolerances.novograd_terms
    return Case(
        name, optim.NovoGrad, None, reference.novograd, names, options, 16, terms, False, ("exp_avg_sq",)
    )


CASES = [
    _adamw("adamw"),
    _adamw("adamw-betas-eps", betas=(0.8, 0.95), eps=1e-2),
    _adamw("adamw-amsgrad", MAX_MOMENTS, amsgrad=True, betas=(0.9, 0.9)),
    _adamw("adamw-maximize", maximize=True),
    _adam("adam"),
    _adam("adam-betas-eps", betas=(0.8, 0.95), eps=1e-2),
    _adam("adam-amsgrad", MAX_MOMENTS, amsgrad=True, betas=(0.9, 0.9)),
    _adam("adam-maximize", maximize=True),
    _adam("adam-decoupled", decoupled_weight_decay=True),
    _sgd("sgd", ()),
    _sgd("sgd-maximize", (), maximize=True),
    _sgd("sgd-momentum", momentum=0.9),
    _sgd("sgd-dampening", momentum=0.9, dampening=0.3),
    _sgd("sgd-nesterov", momentum=0.9, nesterov=True),
    _sgd("sgd-momentum-maximize", momentum=0.8, dampening=0.1, maximize=True),
    _lion("lion"),
    _lion("lion-betas-maximize", betas=(0.95, 0.98), maximize=True),
    _adagrad("adagrad"),
    _adagrad("adagrad-decay", lr_decay=0.1, initial_accumulator_value=0.3, eps=1e-2, maximize=True),
    _rmsprop("rmsprop"),
    _rmsprop("rmsprop-momentum", "momentum_buffer", momentum=0.9, alpha=0.9, eps=1e-2, maximize=True),
    _rmsprop("rmsprop-centered", "grad_avg", centered=True),
    _rmsprop(
        "rmsprop-centered-momentum", "grad_avg", "momentum_buffer", centered=True, momentum=0.8, alpha=0.95
    ),
    _radam("radam"),
    _radam("radam-decoupled", decoupled_weight_decay=True, betas=(0.8, 0.95), eps=1e-2, maximize=True),
    _adafactor("adafactor"),
    _adafactor("adafactor-maximize", lr=0.3, beta2_decay=-0.5, d=2.0, maximize=True),
    _muon("muon"),
    _muon("muon-plain-maximize", nesterov=False, maximize=True, adjust_lr_fn="match_rms_adamw"),
    _nadam("nadam"),
    _nadam("nadam-decoupled", decoupled_weight_decay=True, momentum_decay=0.1, eps=1e-2, maximize=True),
    _lamb("lamb"),
    _lamb("lamb-clip", trust_clip=0.5, bias_correction=False, betas=(0.8, 0.95), eps=1e-2, maximize=True),
    _lars("lars"),
    _lars("lars-nesterov", nesterov=True, momentum=0.8, eps=1e-2, maximize=True),
    _novograd("novograd"),
    _novograd("novograd-averaging", grad_averaging=True, betas=(0.9, 0.5), eps=1e-2, maximize=True),
]
BY_NAME = {case.name: case for case in CASES}
WITH_TORCH = [case for case in CASES if case.torch is not None]
LAYERWISE = [BY_NAME[name] for name in ("lamb", "lars", "novograd")]
_MAIN = "adamw adam-amsgrad sgd sgd-nesterov lion adagrad rmsprop-centered-momentum radam nadam"
MAIN = [*(BY_NAME[name] for name in _MAIN.split()), *LAYERWISE]  # where all would be slow
COMPOSED = [BY_NAME[name] for name in ("adafactor", "muon")]  # of torch's operations, with no op of their own

# Odd sizes around vector widths, several chunks, 0-dim, and empty tensors in the middle and at the end.
SHAPES = [(1,), (7,), (), (3, 5), (0,), (16, 16), (257,), (4, 0, 2), (33, 1, 31), (2, 0)]


def make_params(
    dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32).to(dtype))
        for shape in shapes
    ]


def set_grads(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> list[Tensor]:
    """Give every parameter a gradient, the later ones smaller; the values are exact in the parameter's
    dtype.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator, dtype=torch.float32) * scale * 10.0 ** -(i % 4)
        param.grad = grad.to(param.dtype)
    return [param.grad for param in params]


def has_fused(kind: type[torch.optim.Optimizer]) -> bool:
    """True if torch has a fused ``kind`` for the device of new tensors."""
    param = torch.zeros(1, requires_grad=True)
    param.grad = torch.zeros_like(param)
    try:
        kind([param], fused=True).step()
    except (RuntimeError, TypeError):
        return False
    return True


@contextmanager
def torch_scalars(dtype: torch.dtype) -> Iterator[None]:
    """Within it torch.optim makes the states of one element, like NAdam's mu_product, in ``dtype``."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def kept(entry: dict[str, Any]) -> dict[str, Tensor]:
    """The plain tensors of one parameter's state, as a checkpoint names them."""
    return {name: plain(value) for name, value in entry.items() if isinstance(value, Tensor)}


def bits(tensor: Tensor) -> list[int]:
    """The raw bytes of ``tensor``, by which NaNs and signed zeros compare too."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
