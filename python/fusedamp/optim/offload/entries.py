"""State on the host as the state of the device's parameters: a mapping, and what checkpoints hold."""

from __future__ import annotations

from collections.abc import Iterator, MutableMapping
from typing import Any

import torch
from torch import Tensor

from ...tensors.layout import placed_like
from ...tensors.shards import is_dtensor, local, placed_with
from ...tensors.travel import as_bytes, from_bytes, holds_bytes
from ..core.batch import Group
from ..state.saved import numel_name
from .mirror import Mirror


class Entries(MutableMapping[Any, Any]):
    """The host's state by the device's parameters. A missing entry is created, as in torch."""

    def __init__(self, mirror: Mirror) -> None:
        self._mirror, self._entries = mirror, mirror.host.state

    def _key(self, key: Any) -> Any:
        return self._mirror.twins[key].home if isinstance(key, Tensor) else key

    def __getitem__(self, key: Any) -> Any:
        return self._entries[self._key(key)]

    def __setitem__(self, key: Any, value: Any) -> None:
        self._entries[self._key(key)] = value

    def __delitem__(self, key: Any) -> None:
        del self._entries[self._key(key)]

    def __contains__(self, key: Any) -> bool:
        return (not isinstance(key, Tensor) or key in self._mirror.twins) and self._key(key) in self._entries

    def get(self, key: Any, default: Any = None) -> Any:
        if key not in self:
            return default
        return self[key]

    def __iter__(self) -> Iterator[Any]:
        of = self._mirror.by_home
        return iter([of[key].param if key in of else key for key in self._entries])

    def __len__(self) -> int:
        return len(self._entries)


def place_states(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Make DTensors of the states of DTensors, in place."""
    for index, param in _numbered(optimizer.param_groups, state_dict):
        entry = state_dict["state"].get(index)
        if is_dtensor(param) and isinstance(entry, dict):
            shape = local(param).shape
            for name, value in list(entry.items()):
                if isinstance(value, Tensor) and holds_bytes(value, shape):  # of a split master's remainder
                    entry[name] = as_bytes(placed_with(from_bytes(value), param))
                    entry[numel_name(name)] = param.numel()
                elif isinstance(value, Tensor) and value.dim() and value.shape == shape:
                    entry[name] = placed_with(value, param)
                    entry.pop(numel_name(name), None)  # it is the shard's


def shards_of(groups: list[Group], state_dict: dict[str, Any]) -> dict[str, Any]:
    """Return ``state_dict`` with this rank's shards of the states of DTensors, on the host."""
    if not {"state", "param_groups"} <= state_dict.keys():
        return state_dict  # loading it raises
    state = dict(state_dict["state"])
    for index, param in _numbered(groups, state_dict):
        if is_dtensor(param) and isinstance(state.get(index), dict):
            entry = state[index] = dict(state[index])
            for name, value in list(entry.items()):
                if isinstance(value, Tensor) and holds_bytes(value, param.shape):
                    value = from_bytes(value)
                if isinstance(value, Tensor) and value.dim() and value.shape == param.shape:
                    entry[name] = local(placed_like(value, param)).cpu()
                    if entry.get(numel_name(name)) == value.numel():
                        entry[numel_name(name)] = entry[name].numel()
    return {**state_dict, "state": state}


def _numbered(groups: list[Group], state_dict: dict[str, Any]) -> Iterator[tuple[Any, Tensor]]:
    for group, saved in zip(groups, state_dict["param_groups"], strict=False):
        yield from zip(saved["params"], group["params"], strict=False)
