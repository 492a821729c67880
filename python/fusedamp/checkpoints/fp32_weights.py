"""FP32 weights of a model that trains with 16-bit weights and masters."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..optim.core.optimizer import FusedOptimizer
from ..optim.offload.offloaded import Offloaded
from ..optim.state.formats import has_master, master_values
from ..tensors.layout import STATE_DTYPES
from ..tensors.shards import is_dtensor, local, placed_with


@torch.no_grad()
def fp32_state_dict(model: nn.Module, optimizer: FusedOptimizer | Offloaded) -> dict[str, Any]:
    """Return ``model.state_dict()`` with FP32 master weights in place of 16-bit parameters.

    A split master is joined with its weight: the exact FP32 value. A 16-bit parameter without a master
    (frozen, not stepped yet, or ``master_weights="none"``) is cast to FP32, which changes no value.
    FP32 and FP64 parameters and buffers of all dtypes are as in ``state_dict()``. Tied weights are one
    tensor. A DTensor gives a DTensor. Changes neither ``model`` nor ``optimizer``.

    Args:
        model: the model that ``optimizer`` trains, or a wrapper of it.
        optimizer: an optimizer of :mod:`fusedamp.optim`.
    Returns: new FP32 tensors for 16-bit parameters, with :class:`fusedamp.optim.Offloaded` on the host; the
        others share the model's memory.
    Raises: ValueError if the optimizer trains no parameter of ``model``.
    Cost: 4 bytes of new memory per 16-bit parameter; no host sync, except with Offloaded.
    """
    if not isinstance(optimizer, FusedOptimizer | Offloaded):
        raise TypeError(
            f"[fp32_state_dict] optimizer is {type(optimizer).__name__}; expected an optimizer of "
            "fusedamp.optim. Pass the optimizer itself if a trainer wraps it."
        )
    trained = {id(param) for group in optimizer.param_groups for param in group["params"]}
    result: dict[str, Any] = model.state_dict(keep_vars=True)
    if trained.isdisjoint(map(id, result.values())):
        raise ValueError(
            f"[fp32_state_dict] the {type(optimizer).__name__} trains none of the parameters in "
            f"{type(model).__name__}.state_dict(); expected the model that it trains. Pass that model."
        )
    offloads = isinstance(optimizer, Offloaded)
    # The property would make the next step check everything.
    state = optimizer.state if offloads else vars(optimizer)["state"]
    made: dict[int, Tensor] = {}  # tied weights occur several times
    for name, value in result.items():
        if isinstance(value, Tensor):
            if id(value) not in made:
                entry = state.get(value, {}) if id(value) in trained else {}
                made[id(value)] = _in_fp32(value, entry, offloads)
            result[name] = made[id(value)]
    return result


def _in_fp32(value: Tensor, entry: dict[str, Any], offloads: bool) -> Tensor:
    if not isinstance(value, nn.Parameter) or not has_master(value, "fp32"):
        return value.detach()
    if entry.get("master") is None:
        return value.detach().to(STATE_DTYPES[value.dtype])
    if not offloads:
        return master_values(entry, value.detach())
    made = master_values(entry, local(value).detach().cpu())
    return placed_with(made, value) if is_dtensor(value) else made
