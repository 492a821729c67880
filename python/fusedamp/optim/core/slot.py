"""Per-parameter cache of what the ops take: a dense real tensor, states, master, step count, gradient."""

from __future__ import annotations

from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ...tensors.layout import STATE_DTYPES, placed_like, strided_like
from ...tensors.places import WHOLE, place_of
from ...tensors.shards import local
from ..state.encoded import Encoded, Quantized, Remainder, parts, plain
from ..state.saved import Entry
from ..state.spec import State, StateSpec, complete


class Mode(NamedTuple):
    """Options of a group that affect how a step handles its parameters."""

    states: tuple[StateSpec, ...]  # those in use, in the op's order
    op: str
    master_weights: str
    state_dtype: str
    stochastic_rounding: bool
    rounding_seed: int | None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple([spec.name for spec in self.states])

    def is_random(self) -> bool:
        return self.stochastic_rounding or self.state_dtype != "float32"


class Slot:
    """Per-parameter cache of the op's arguments; reused between steps while ``holds`` is true.

    The constructor creates missing states and converts those that no longer fit, for example after
    ``param.data`` moved to another device. A parameter with gaps between its elements is updated in a dense
    copy, which ``finish`` copies back.
    """

    def __init__(self, param: Tensor, entry: Entry, mode: Mode, wanted_states: list[State]) -> None:
        source = local(param)
        complete(param, entry, wanted_states)
        names = tuple(state.name for state in wanted_states if state.name != "master")
        wanted = torch.empty_like(source, device="meta").stride()
        self.param, self.source, self.entry, self.mode, self.names = param, source, entry, mode, names
        self.dense = source if source.stride() == wanted else torch.empty_like(source).copy_(source)
        self.target = _real(self.dense)
        states = [local(entry[name]) for name in names]
        self.states = tuple(_real(plain(state)) for state in states)
        self.scales = tuple(state.scales for state in states if isinstance(state, Quantized))
        self.master = _real(plain(local(entry["master"]))) if "master" in entry else None
        # State keys (and attributes) of the tensors above, in the order of the op's columns.
        self.columns: list[tuple[str, str | None]] = [("step", None)]
        if self.master is not None:
            self.columns.append(("master", "bits" if isinstance(entry["master"], Remainder) else None))
        kinds = list(zip(names, states, strict=True))
        self.columns += [(name, "bits" if isinstance(state, Quantized) else None) for name, state in kinds]
        self.columns += [(name, "scales") for name, state in kinds if isinstance(state, Quantized)]
        self.step: Tensor = entry["step"]
        self.key = (str(source.device), self.master is None)  # parameters with equal keys share a call
        self.turn = -1  # the last step that used it
        self.seed = 0  # of its random numbers
        self.place = place_of(getattr(param, "shard_of", param), self.dense) if mode.is_random() else WHOLE
        self._values = tuple(entry.values())
        self._inside = self._inside_of(self._values)
        self._dtype, self._numel, self._stride = source.dtype, source.numel(), source.stride()
        self._device_index = source.get_device()
        self._grad_dtype: torch.dtype | None = None  # of the last checked gradient
        self.reusable = self.target is source

    def holds(self, entry: Entry | None, mode: Mode) -> bool:
        """True if the parameter's layout and states are the ones that the slot was built from."""
        source = self.param if type(self.param) is Parameter else local(self.param)
        return (
            self.reusable  # copies, and views of an earlier param.data, are rebuilt at each step
            and source is self.source
            and entry is self.entry
            and mode == self.mode
            and source.dtype is self._dtype
            and source.numel() == self._numel  # with dense strides, this determines the shape
            and source.stride() == self._stride
            and source.get_device() == self._device_index
            and len(entry) == len(self._values)
            and all(map(is_, entry.values(), self._values))
            and self._has_same_inside()
        )

    def _has_same_inside(self) -> bool:
        """True if encoded states still contain the tensors that the step reads."""
        if not self._inside:
            return True
        now = self._inside_of(self._values)
        return len(now) == len(self._inside) and all(map(is_, now, self._inside))

    @staticmethod
    def _inside_of(values: tuple[Any, ...]) -> list[Tensor]:
        shards = [local(value) for value in values if isinstance(value, Tensor)]
        return [part for shard in shards if isinstance(shard, Encoded) for part in parts(shard)]

    def paired(self, grad: Tensor) -> Tensor:
        """Return ``grad`` in the form that the op takes: the local shard, real, with the strides of
        ``target``."""
        if self.source is not self.param:
            grad = local(placed_like(grad, self.param))
        if self.reusable and grad.dtype is self._grad_dtype and grad.stride() == self._stride:
            return grad
        source, wide = self.source, STATE_DTYPES[self._dtype]
        grad_wide = STATE_DTYPES.get(grad.dtype)
        if (
            grad.shape != source.shape
            or grad.device != source.device
            or grad_wide is None
            or grad_wide.is_complex != wide.is_complex
            or grad_wide.itemsize > wide.itemsize
        ):
            raise ValueError(
                f"has a gradient of shape {list(grad.shape)}, {grad.dtype} on {grad.device}; expected shape "
                f"{list(source.shape)}, {wide} or narrower on {source.device}. Cast it."
            )
        self._grad_dtype = grad.dtype
        return _real(strided_like(grad.resolve_conj(), self.dense))

    def finish(self) -> None:
        """Copy the op's results back to the user's tensors."""
        if self.dense is not self.source:
            self.source.copy_(self.dense)
        if self.source is not self.param:
            torch.autograd.graph.increment_version(self.param)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
