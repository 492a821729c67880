"""Turns the linear layers of a model into fusedamp's, in place."""

from __future__ import annotations

import sys
import warnings
from collections import Counter
from itertools import pairwise
from typing import Any, TypeVar

import torch
from torch import nn

from .layers import Linear, LinearGELU, need_float32_grads, need_grad_dtype, set_grad_dtype
from .mlp import has_hooks

KNOWN = (nn.Linear, Linear, LinearGELU)
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
        fuse_gelu: also join neighbors Linear, GELU(approximate="tanh") of an ``nn.Sequential`` to a
            :class:`fusedamp.nn.LinearGELU`, with an ``nn.Identity`` in the place of GELU. Layers that have
            hooks or occur more than once stay; so does the exact GELU.
    Returns: the model.
    Raises: TypeError, ValueError naming the argument. RuntimeError if a 16-bit gradient exists and FP32 is
        asked for.
    Warns: UserWarning naming linear layers that stay as they are (subclasses, ``nn.MultiheadAttention``,
        whose projections are no modules), and if ``fuse_gelu`` joins nothing.
    """
    if not isinstance(model, nn.Module):
        got = f"the class {model.__name__}" if isinstance(model, type) else f"a {type(model).__name__}"
        raise TypeError(f"[convert] model is {got}; expected an nn.Module. Pass the model itself.")
    need_grad_dtype("convert", grad_dtype)
    if not isinstance(fuse_gelu, bool):
        raise TypeError(f"[convert] fuse_gelu is {fuse_gelu!r}; expected True or False")
    layers: list[Any] = [m for m in model.modules() if type(m) in KNOWN]
    _warn_of_others(model, bool(layers))
    if "torch._dynamo" in sys.modules:  # the compiler of torch 2.11 does not notice another class
        torch.compiler.reset()
    for layer in layers if grad_dtype is not None else ():
        need_float32_grads("convert", layer, grad_dtype)
    for layer in layers:
        if type(layer) is nn.Linear:
            layer.__class__ = Linear
        if grad_dtype is not None:
            layer.grad_dtype = grad_dtype
            set_grad_dtype(layer)
    if fuse_gelu and not _join_gelu(model) and not any(type(m) is LinearGELU for m in model.modules()):
        warnings.warn(
            "[convert] fuse_gelu=True joined nothing: no nn.Sequential has an nn.Linear before an "
            'nn.GELU("tanh") without hooks. Use fusedamp.nn.LinearGELU or fusedamp.nn.MLP.',
            stacklevel=2,
        )
    return model


def _warn_of_others(model: nn.Module, converted: bool) -> None:
    """Name the linear layers whose gradients stay rounded."""
    inside = {id(m) for a in model.modules() if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    others = Counter(
        type(m).__name__
        for m in model.modules()
        if isinstance(m, nn.MultiheadAttention)
        or (isinstance(m, nn.Linear) and type(m) not in KNOWN and id(m) not in inside)
    )
    names = ", ".join(f"{count} {name}" for name, count in sorted(others.items()))
    if converted and not others:
        return
    text = f"[convert] {'some layers' if converted else 'nothing'} of {type(model).__name__}"
    text += " stay as they are" if converted else " was converted: it has no nn.Linear"
    text += f": {names}, whose weight gradients are rounded to 16 bits" if names else ""
    lazy = " Run one batch before convert, which makes lazy layers nn.Linear." if "Lazy" in names else ""
    warnings.warn(f"{text}.{lazy}", stacklevel=3)


def _join_gelu(model: nn.Module) -> int:
    joined = 0
    places = Counter(id(m) for _, m in model.named_modules(remove_duplicate=False))
    for sequence in [m for m in model.modules() if type(m) is nn.Sequential and not has_hooks(m)]:
        for (_, layer), (name, gelu) in pairwise(list(sequence._modules.items())):
            if type(layer) is not Linear or type(gelu) is not nn.GELU or gelu.approximate != "tanh":
                continue
            if places[id(layer)] == 1 and not has_hooks(layer) and not has_hooks(gelu):
                layer.__class__ = LinearGELU
                sequence._modules[name] = nn.Identity()
                joined += 1
    return joined
