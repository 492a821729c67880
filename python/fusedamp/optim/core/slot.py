"""One parameter as the ops see it: a dense real tensor with its states, master, step count and gradient."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from ...tensors.layout import STATE_DTYPES, is_fake, overlaps_itself, placed_like, strided_like
from ...tensors.shards import local
from ..state.encoded import Encoded, Quantized, Remainder, parts, plain
from ..state.formats import (
    Entry,
    adapted,
    has_master,
    keep_master,
    label,
    need_storable,
    numel_name,
    stored_dtype,
)
from ..state.steps import as_step, check_step

Like = Callable[[str], Tensor | None]  # a tensor like the parameter's state of that name; None: it has none
NewState = Callable[[str, Tensor, torch.dtype, Entry], Tensor]  # like a tensor, kept in a dtype


class Mode(NamedTuple):
    """What a step needs to know of the options of a group."""

    names: tuple[str, ...]  # of the states in use
    op: str
    nonnegative: tuple[str, ...]  # of the states
    master_weights: str
    state_dtype: str
    stochastic_rounding: bool
    rounding_seed: int | None

    def is_random(self) -> bool:
        return self.stochastic_rounding or self.state_dtype != "float32"


class Slot:
    """What the op gets for one parameter; kept between steps for as long as ``holds`` is true.

    Building it creates missing states and mends those that no longer fit, as after ``param.data`` went to
    another device. A parameter with gaps between its elements is stepped on a dense copy, which ``finish``
    writes back.
    """

    def __init__(self, param: Tensor, entry: Entry, mode: Mode, like: Like, new_state: NewState) -> None:
        source = local(param)
        check(source)
        names = complete(param, entry, mode, like, new_state)
        wanted = torch.empty_like(source, device="meta").stride()
        self.param, self.source, self.entry, self.mode, self.names = param, source, entry, mode, names
        self.dense = source if source.stride() == wanted else torch.empty_like(source).copy_(source)
        self.target = _real(self.dense)
        states = [entry[name] for name in names]
        self.states = tuple(_real(plain(local(state))) for state in states)
        self.scales = tuple(state.scales for state in states if isinstance(state, Quantized))
        self.master = _real(plain(local(entry["master"]))) if "master" in entry else None
        # What the tensors above are called in the state, in the order of an op's columns: key, and attribute
        # of it.
        self.columns: list[tuple[str, str | None]] = [("step", None)]
        if self.master is not None:
            self.columns.append(("master", "bits" if isinstance(entry["master"], Remainder) else None))
        kinds = list(zip(names, states, strict=True))
        self.columns += [(name, "bits" if isinstance(state, Quantized) else None) for name, state in kinds]
        self.columns += [(name, "scales") for name, state in kinds if isinstance(state, Quantized)]
        self.step: Tensor = entry["step"]
        self.key = (str(source.device), self.master is None)  # what may share a call with it
        self.turn = -1  # the step that used it last
        self.seed = 0  # of its random numbers
        self._values = tuple(entry.values())
        self._inside = [part for value in self._values if isinstance(value, Encoded) for part in parts(value)]
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
            and self._has_same_inside()
        )

    def _has_same_inside(self) -> bool:
        """Whether encoded states still have the tensors that the step reads."""
        if not self._inside:
            return True
        now = [part for value in self._values if isinstance(value, Encoded) for part in parts(value)]
        return len(now) == len(self._inside) and all(map(is_, now, self._inside))

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


def check_distinct(where: str, params: list[Any]) -> None:
    """Raise where a parameter is among ``params`` twice."""
    if len(set(map(id, params))) != len(params):
        raise ValueError(f"{where} a parameter is given twice; expected it once. Remove the second.")


def check_aliasing(where: str, slots: Iterable[Slot]) -> None:
    """Raise where two parameters share memory: an op that updates both at once would race with itself."""
    ranges = sorted(  # the place of a slot breaks ties
        ((slot.key[0], slot.source.data_ptr(), _reach(slot.source), i), slot.source)
        for i, slot in enumerate(slots)
        if slot.source.numel() and not is_fake(slot.source)
    )
    last: list[tuple[Any, Tensor]] = []  # those that may reach into what comes
    for (device, start, size, i), source in ranges:
        last = [(key, one) for key, one in last if key[0] == device and key[1] + key[2] > start]
        if any(_overlap(one, source) for _, one in last):
            raise ValueError(
                f"{where} two parameters share memory at {start:#x} on {device}; expected disjoint. "
                "Tie weights by using one Parameter object, and pass it once."
            )
        last.append(((device, start, size, i), source))


def _reach(tensor: Tensor) -> int:
    """Bytes from the first element to the end of the last."""
    steps = ((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (sum(steps) + 1) * tensor.element_size()


def _overlap(one: Tensor, other: Tensor) -> bool:
    """Whether an element of each lies in the same memory, of two whose ranges meet."""
    size = one.element_size()
    distance = other.data_ptr() - one.data_ptr()
    if size != other.element_size() or distance % size:
        return True
    seen = torch.zeros(max(_reach(one), distance + _reach(other)) // size, dtype=torch.bool)
    seen.as_strided(one.shape, one.stride()).fill_(True)
    return bool(seen.as_strided(other.shape, other.stride(), distance // size).any())


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


def check(source: Tensor) -> None:
    """Raise where the parameter ``source`` cannot be stepped."""
    check_dtype(source)
    got = _kind(source)
    if source.device.type not in ("cpu", "cuda"):
        raise ValueError(f"{got}; expected cpu or cuda. Move the model there before the step.")
    if source.numel() and not is_fake(source) and not source.data_ptr():
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
    making = making_complete(param, entry, mode, like, new_state)
    while True:
        try:
            next(making)
        except StopIteration as end:
            return end.value


def making_complete(
    param: Tensor, entry: Entry, mode: Mode, like: Like, new_state: NewState
) -> Generator[None, None, tuple[str, ...]]:
    """`complete`, one tensor at a time."""
    likes = {name: template for name in mode.names if (template := like(name)) is not None}
    stored = {}
    for name, template in likes.items():
        stored[name] = STATE_DTYPES[template.dtype]
        if template is param:  # else a scalar or the like, which is always wide
            need_storable(param, mode.state_dtype)
            stored[name] = stored_dtype(param.dtype, mode.state_dtype, name in mode.nonnegative)
    wants_master = has_master(param, mode.master_weights)
    if param.is_complex() and (mode.master_weights == "split" or mode.stochastic_rounding):
        raise ValueError(
            f"{_kind(param)}; expected a real parameter for split masters and stochastic rounding. Put it "
            'into a group of its own with master_weights="fp32" or "none", and stochastic_rounding=False.'
        )
    needed = {"step", *likes, *(["master"] if wants_master else [])}
    if param.is_cuda and not needed <= entry.keys() and torch.cuda.is_current_stream_capturing():
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
    else:
        check_step(step)
    yield
    for name, template in likes.items():
        if entry.get(name) is None:
            entry[name] = new_state(name, template, stored[name], entry)
        else:
            entry[name] = adapted(entry, name, template, stored[name])
        label(entry, name)
        yield
    if wants_master:
        keep_master(entry, param, mode.master_weights)
    else:
        entry.pop("master", None)
        entry.pop(numel_name("master"), None)
    return tuple(likes)
