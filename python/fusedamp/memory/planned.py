"""Parameters without memory and their groups' options, for an existing or a planned optimizer."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..optim.core.batch import Group
from ..optim.core.optimizer import FusedOptimizer
from ..tensors.shards import local

_PROBE = 64  # rows and columns of a matrix that tests whether state sizes depend on shapes


@dataclass(frozen=True)
class Weight:
    """A parameter without memory; ``group`` is None if it is frozen."""

    meta: Tensor
    grad_dtype: torch.dtype
    group: Group | None


def plan(
    params: Any, kind: type[FusedOptimizer], options: dict[str, Any], dtype: torch.dtype | None
) -> tuple[FusedOptimizer, list[Weight]]:
    """Construct an optimizer of class ``kind`` on parameters without memory."""
    groups = list(_groups(params))
    metas = [[_meta(item, dtype) for item in group["params"]] for group in groups]
    active = [[meta for meta, _, frozen in group if not frozen] for group in metas]
    frozen = [Weight(meta, width, None) for group in metas for meta, width, frozen in group if frozen]
    if not any(active):
        raise ValueError(
            f"[estimate] {type(params).__name__} has no parameter to train; expected at least one. "
            "Pass a model with parameters that require gradients, or shapes."
        )
    parameters = inspect.signature(kind).parameters
    if not any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        _need_options(kind.__name__, options, parameters.keys() - {"params"})
    planned = [{**group, "params": some} for group, some in zip(groups, active, strict=True) if some]
    made = kind(planned, **options)
    if isinstance(params, (int, float)):
        _need_no_shape(made)
    widths = {id(meta): width for group in metas for meta, width, _ in group}
    trained = [(param, group) for group in made.param_groups for param in group["params"]]
    return made, [Weight(param, widths[id(param)], group) for param, group in trained] + frozen


def owned(
    params: Any, optimizer: torch.optim.Optimizer, options: dict[str, Any], dtype: torch.dtype | None
) -> list[Weight]:
    """Return the parameters of an existing optimizer and the other tensors of ``params``."""
    _need_options(type(optimizer).__name__, options, optimizer.defaults.keys())
    given = {id(item): item for group in _groups(params) for item in group["params"]}
    weights = []
    for g, group in enumerate(optimizer.param_groups):
        for i, param in enumerate(group["params"]):
            if given.pop(id(param), None) is None:
                raise ValueError(
                    f"[estimate] the optimizer's group {g} params[{i}], of shape {list(param.shape)}, is not "
                    "among the parameters given; expected all of them. Pass the model that it trains."
                )
            meta, width, _ = _meta(param, dtype)
            weights.append(Weight(meta, width, {**group, **options}))
    return weights + [Weight(*_meta(item, dtype)[:2], None) for item in given.values()]


def _need_options(name: str, options: dict[str, Any], known: Set[str]) -> None:
    unknown = sorted(options.keys() - known)
    if unknown:
        raise TypeError(
            f"[estimate] {unknown[0]} is not an option of {name}; expected some of {sorted(known)}. "
            "Leave it out."
        )


def _groups(params: Any) -> Iterator[dict[str, Any]]:
    """Yield ``params`` as param groups of tensors and shapes."""
    if isinstance(params, nn.Module):
        yield {"params": list(params.parameters())}
        return
    if isinstance(params, (int, float)) and not isinstance(params, bool):
        if params != int(params) or params < 1:
            raise ValueError(f"[estimate] {params} parameters; expected a whole number from 1.")
        yield {"params": [(int(params),)]}
        return
    items = [params] if isinstance(params, Tensor) else params
    if isinstance(items, (str, bytes, dict)) or not isinstance(items, Iterable):
        raise TypeError(
            f"[estimate] the first argument is {params!r}; expected a module, a tensor, a number of "
            "elements, or an iterable of tensors, shapes or param groups. Put a single group into a list."
        )
    items = list(items)
    groups = [item for item in items if isinstance(item, dict)]
    if len(groups) not in (0, len(items)):
        raise TypeError("[estimate] param groups and parameters are mixed; expected only one of them.")
    for group in groups or [{"params": items}]:
        inner = group["params"]
        inner = [inner] if isinstance(inner, Tensor) else inner
        named = [item[1] if _is_named(item) else item for item in inner]
        yield {**group, "params": named}


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _meta(item: Any, dtype: torch.dtype | None) -> tuple[Tensor, torch.dtype, bool]:
    """Return a parameter without memory, the dtype of its gradient, and whether it is frozen."""
    if isinstance(item, Tensor):
        item_dtype = item.dtype if dtype is None or not item.is_floating_point() else dtype
        meta = torch.empty_like(local(item).detach(), device="meta", dtype=item_dtype)
        main = getattr(item, "main_grad", None)
        stated = getattr(item, "grad_dtype", None) if main is None else main.dtype
        width = stated if stated is not None and stated != item.dtype else item_dtype
        return meta, width, isinstance(item, nn.Parameter) and not item.requires_grad
    sizes = list(item) if isinstance(item, Iterable) and not isinstance(item, str) else [item]
    if not all(isinstance(size, int) and not isinstance(size, bool) and size >= 0 for size in sizes):
        raise TypeError(
            f"[estimate] {item!r} is neither a tensor nor a shape; expected tensors, or tuples of sizes."
        )
    dtype = torch.float32 if dtype is None else dtype
    return torch.empty(sizes, dtype=dtype, device="meta"), dtype, False


def _need_no_shape(optimizer: FusedOptimizer) -> None:
    shapes = ((_PROBE, _PROBE), (_PROBE * _PROBE,))
    group = optimizer.param_groups[0]
    states = [optimizer.planned_state(torch.empty(shape, device="meta"), group) for shape in shapes]
    of_matrix, of_vector = (
        {name: value.numel() for name, value in entry.items() if isinstance(value, Tensor)}
        for entry in states
    )
    if of_matrix != of_vector:
        raise ValueError(
            f"[estimate] a number of parameters is not enough for {type(optimizer).__name__}, which has "
            "different states for matrices and vectors; expected shapes. Pass a model, or its shapes."
        )
