"""Turns the linear layers of a model into fusedamp's, in place."""

from __future__ import annotations

import warnings
from collections import Counter
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from .linear import Linear, LinearGELU, need_float32_grads, need_grad_dtype, set_grad_dtype
from .mlp import has_hooks

Model = TypeVar("Model", bound=nn.Module)


def convert(model: Model, *, grad_dtype: torch.dtype | None = None, fuse_gelu: bool = False) -> Model:
    """Make every ``nn.Linear`` of a model a :class:`fusedamp.nn.Linear`, in place.

    Only the class changes: parameters, keys, hooks, ties and attributes stay, so checkpoints and optimizers
    are not affected. Subclasses of ``nn.Linear`` (LoRA, quantized or parametrized layers) are left alone. A
    second call changes nothing, but for the options that it is given.

    Args:
        model: any module, wrapped or not; an ``nn.Linear`` itself too.
        grad_dtype: ``torch.float32`` for FP32 gradients of 16-bit parameters; see the limits in
            :class:`fusedamp.nn.Linear`. None leaves converted layers as they are.
        fuse_gelu: also join neighbours Linear, GELU(approximate="tanh") of an ``nn.Sequential`` to a
            :class:`fusedamp.nn.LinearGELU`, with an ``nn.Identity`` in the place of GELU. Layers that have
            hooks or occur more than once stay; so does the exact GELU.
    Returns: the model.
    Raises: TypeError, ValueError naming the argument. RuntimeError if a 16-bit gradient exists and FP32 is
        asked for.
    Warns: UserWarning if the model has no layer to convert.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"[convert] model is {model!r}; expected an nn.Module. Pass the model itself.")
    need_grad_dtype("convert", grad_dtype)
    if not isinstance(fuse_gelu, bool):
        raise TypeError(f"[convert] fuse_gelu is {fuse_gelu!r}; expected True or False")
    layers: list[Any] = [m for m in model.modules() if type(m) in (nn.Linear, Linear, LinearGELU)]
    if not layers:
        warnings.warn(
            f"[convert] {type(model).__name__} has no nn.Linear; nothing was converted. Subclasses of "
            "nn.Linear are left alone.",
            stacklevel=2,
        )
    for layer in layers if grad_dtype is not None else ():
        need_float32_grads("convert", layer, grad_dtype)
    for layer in layers:
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
        if grad_dtype is not None:
            layer.grad_dtype = grad_dtype
            set_grad_dtype(layer)
    if fuse_gelu:
        _join_gelu(model)
    return model


def _join_gelu(model: nn.Module) -> None:
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for sequence in [m for m in model.modules() if type(m) is nn.Sequential and not has_hooks(m)]:
        for (_, layer), (name, gelu) in pairwise(list(sequence._modules.items())):
            if type(layer) is not Linear or type(gelu) is not nn.GELU or gelu.approximate != "tanh":
                continue
            if places[id(layer)] == 1 and not has_hooks(layer) and not has_hooks(gelu):
                layer.__class__ = LinearGELU
                sequence._modules[name] = nn.Identity()
