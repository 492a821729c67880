"""One parameter as the ops see it: a dense real tensor with its states, master, step count and gradient."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from operator import is_
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ..sharding import local
from .layout import STATE_DTYPES, fits, fitted, overlaps_itself, placed_like, strided_like

Entry = dict[str, Any]  # optimizer.state[param]
Mode = tuple[tuple[str, ...], str, str]  # names of the states in use, master_weights, name of the op
Like = Callable[[str], Tensor | None]  # a tensor like the parameter's state of that name; None: it has none
NewState = Callable[[str, Tensor, Entry], Tensor]  # from a tensor like it


class Slot:
    """What the op gets for one parameter; kept between steps for as long as ``holds`` is true.

    Building it creates missing states and mends those that no longer fit, as after ``param.data`` went to
    another device. A parameter with gaps between its elements is stepped on a dense copy, which ``finish``
    writes back.
    """

    def __init__(self, param: Tensor, entry: Entry, mode: Mode, like: Like, new_state: NewState) -> None:
        source = local(param)
        _check(source)
        names = complete(param, entry, mode, like, new_state)
        wanted = torch.empty_like(source, device="meta").stride()
        self.param, self.source, self.entry, self.mode, self.names = param, source, entry, mode, names
        self.dense = source if source.stride() == wanted else torch.empty_like(source).copy_(source)
        self.target = _real(self.dense)
        self.states = tuple(_real(local(entry[name])) for name in names)
        self.master = _real(local(entry["master"])) if "master" in entry else None
        self.step: Tensor = entry["step"]
        self.key = (str(source.device), self.master is None)  # what may share a call with it
        self.turn = -1  # the step that used it last
        self._values = tuple(entry.values())
        self._dtype, self._numel, self._stride = source.dtype, source.numel(), source.stride()
        self._device_index = source.get_device()
        self._grad_dtype: torch.dtype | None = None  # of the last gradient that was checked
        self.reusable = self.target is source

    def holds(self, entry: Entry | None, mode: Mode) -> bool:
        """Whether the parameter's format and its states are still those that the slot was made from."""
        source = self.param if type(self.param) is Parameter else local(self.param)
        return (
            self.reusable  # a copy, or a view of what param.data was, is made anew each step
            and source is self.source
            and entry is self.entry
            and mode == self.mode
            and source.dtype is self._dtype
            and source.numel() == self._numel  # with the strides of a dense tensor it stands for the shape
            and source.stride() == self._stride
            and source.get_device() == self._device_index
            and len(entry) == len(self._values)
            and all(map(is_, entry.values(), self._values))
        )

    def paired(self, grad: Tensor) -> Tensor:
        """``grad`` as the op wants it: the local shard, real, with the strides of ``target``."""
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
        """Bring what the op wrote to where the user looks."""
        if self.dense is not self.source:
            self.source.copy_(self.dense)
        if self.source is not self.param:
            torch.autograd.graph.increment_version(self.param)


def as_step(value: Any, param: Tensor) -> Tensor:
    """A new step count as the ops want it: FP32, 0-d, on the parameter's device; a number without a sync."""
    if not isinstance(value, Tensor):
        return torch.full((), float(value), dtype=torch.float32, device=param.device)
    return torch.as_tensor(value, dtype=torch.float32, device=param.device).detach().reshape(()).clone()


def has_master(param: Tensor, master_weights: str) -> bool:
    """Whether ``param`` keeps an FP32 master: 16-bit parameters do, unless told not to."""
    return master_weights != "none" and STATE_DTYPES.get(param.dtype, param.dtype) != param.dtype


def check_aliasing(where: str, slots: Iterable[Slot]) -> None:
    """Raise where two parameters share memory: an op that updates both at once would race with itself."""
    ranges = sorted(
        (slot.key[0], slot.target.data_ptr(), slot.target.numel() * slot.target.element_size())
        for slot in slots
        if slot.target.numel()
    )
    for (device, start, size), (other_device, other_start, _) in itertools.pairwise(ranges):
        if device == other_device and start + size > other_start:
            raise ValueError(
                f"{where} two parameters share memory at {other_start:#x} on {device}; expected disjoint. "
                "Tie weights by using one Parameter object, and pass it once."
            )


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _kind(source: Tensor) -> str:
    return f"is {str(source.dtype).removeprefix('torch.')} of shape {list(source.shape)} on {source.device}"


def check_dtype(source: Tensor) -> None:
    """Raise where a parameter like ``source`` cannot be optimized at all."""
    if source.dtype not in STATE_DTYPES:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in STATE_DTYPES)
        raise ValueError(
            f"{_kind(source)}; expected one of {wanted}. Cast it, or leave it out of the optimizer."
        )


def _check(source: Tensor) -> None:
    check_dtype(source)
    got = _kind(source)
    if source.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{got}; expected cpu or cuda. Move the model there before the step.")
    if source.numel() and not source.data_ptr():
        raise ValueError(f"{got} and has no storage; expected memory to update. Restore it before the step.")
    if source.numel() and overlaps_itself(source):
        raise ValueError(
            f"{got} with strides {list(source.stride())}, so that elements share an address; expected one "
            "address for each. Use param.contiguous() as the parameter."
        )


def complete(param: Tensor, entry: Entry, mode: Mode, like: Like, new_state: NewState) -> tuple[str, ...]:
    """Create what is missing in ``entry``, mend what doesn't fit, drop a master that is not wanted.

    Returns the names of the states that the parameter has, which may be fewer than those of its group.
    """
    wanted, master_weights, _ = mode
    likes = {name: template for name in wanted if (template := like(name)) is not None}
    names = tuple(likes)
    wants_master = has_master(param, master_weights)
    if (
        param.is_cuda
        and len(entry) < len(names) + 1 + wants_master
        and torch.cuda.is_current_stream_capturing()
    ):
        raise RuntimeError(
            "has no optimizer state yet; expected it before graph capture, as a replay would reset it. "
            "Run one step before capturing."
        )
    step = entry.get("step", 0.0)
    if (
        not isinstance(step, Tensor)
        or step.dtype != torch.float32
        or step.dim()
        or step.device != param.device
    ):
        entry["step"] = as_step(step, param)
    for name in names:
        if entry.get(name) is None:
            entry[name] = new_state(name, likes[name], entry)
    if not wants_master:
        entry.pop("master", None)
    elif entry.get("master") is None:
        entry["master"] = fitted(param, param)
    for name, template in (likes | {"master": param} if wants_master else likes).items():
        if not fits(entry[name], template):
            check_shape(name, entry[name], template)
            entry[name] = fitted(entry[name], template)
    return names


def check_shape(name: str, value: Any, param: Tensor) -> None:
    """Raise unless ``value`` can become the state ``name`` of ``param``."""
    if not isinstance(value, Tensor):
        raise TypeError(
            f"has state {name!r} of type {type(value).__name__}; expected a tensor. Pass a state_dict()."
        )
    if value.shape != param.shape or value.is_complex() != param.is_complex():
        raise ValueError(
            f"has state {name!r} of shape {list(value.shape)}, {value.dtype}; expected {list(param.shape)} "
            f"for a {param.dtype} parameter. Load a matching checkpoint, or clear optimizer.state."
        )
