"""One row per optimizer and variant, read by tests and benchmarks.

``weight_decay`` is never 0: a decay that is wrong, or missing, must show in every row. For the same reason
``eps`` is large in some.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import reference
import tolerances
import torch
from fusedamp import optim
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """An optimizer with its options, its ``torch.optim`` namesake and its reference."""

    name: str
    ours: type[torch.optim.Optimizer]
    torch: type[torch.optim.Optimizer]
    reference: Callable
    states: tuple[str, ...]
    options: dict[str, Any]
    roundings: int  # per element and step, of the size of the update's terms (tolerances.py)
    terms: Callable[[Tensor, dict[str, Any], dict[str, Any]], Tensor]

    def __str__(self) -> str:
        return self.name


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
]
BY_NAME = {case.name: case for case in CASES}
MAIN = [BY_NAME[name] for name in ("adamw", "adam-amsgrad", "sgd", "sgd-nesterov")]  # where all would be slow

# Odd sizes around vector widths, several chunks, 0-dim, and empty tensors in the middle and at the end.
SHAPES = [(1,), (7,), (), (3, 5), (0,), (16, 16), (257,), (4, 0, 2), (33, 1, 31), (2, 0)]


def make_params(
    dtype: torch.dtype, shapes: list[tuple[int, ...]] = SHAPES, seed: int = 0
) -> list[torch.nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def set_grads(params: list[torch.nn.Parameter], seed: int, scale: float = 1.0) -> list[Tensor]:
    """Give every parameter a gradient, the later ones smaller; the values are exact in the parameter's
    dtype.
    """
    generator = torch.Generator().manual_seed(1000 + seed)
    for i, param in enumerate(params):
        grad = torch.randn(param.shape, generator=generator) * scale * 10.0 ** -(i % 4)
        param.grad = grad.to(param.dtype)
    return [param.grad for param in params]


def bits(tensor: Tensor) -> list[int]:
    """The raw bytes of ``tensor``, by which NaNs and signed zeros compare too."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).tolist()
