"""Estimates the memory of weights, gradients, masters and states without allocating any of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..optim.core.batch import Group
from ..optim.core.optimizer import FusedOptimizer
from ..optim.core.options import STORAGE
from ..optim.offload.offloaded import Offloaded
from ..optim.state.encoded import plain
from ..optim.state.formats import has_master, name_dtypes
from ..tensors.layout import STATE_DTYPES
from .planned import Weight, owned, plan

_TO_NEAREST = {"stochastic_rounding": False}  # needs the same memory, and is valid in every mode
_PLAIN = {option: values[0] for option, values in STORAGE.items()}


@dataclass(frozen=True)
class Memory:
    """Bytes of each part between two steps, in one training mode; ``host`` of them on the host (offload)."""

    name: str
    weights: int
    gradients: int
    masters: int
    states: int
    host: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.masters + self.states

    @property
    def device(self) -> int:
        """Bytes that are not on the host."""
        return self.total - self.host


@dataclass(frozen=True)
class Estimate:
    """Result of :func:`estimate`: ``rows[0]`` is the requested mode; ``print`` shows all rows as a table.

    ``params`` is the number of elements, ``tensors`` the number of parameters.
    """

    optimizer: str
    params: int
    tensors: int
    rows: tuple[Memory, ...]

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, for JSON."""
        rows = [{**asdict(row), "total": row.total} for row in self.rows]
        return {"optimizer": self.optimizer, "params": self.params, "tensors": self.tensors, "rows": rows}

    def __str__(self) -> str:
        width = max(19, *(len(row.name) for row in self.rows))
        offloads = any(row.host for row in self.rows)
        heads = ["weights", "gradients", "masters", "states", "sum", *(("device", "host") * offloads)]
        lines = [
            f"{self.optimizer}: {self.params:,} parameters in {self.tensors:,} tensors",
            f"{'bytes per parameter':{width}}" + "".join(f"{head:>11}" for head in heads) + f"{'in all':>13}",
        ]
        for row in self.rows:
            parts = [row.weights, row.gradients, row.masters, row.states, row.total]
            parts += [row.device, row.host] * offloads
            figures = "".join(f"{part / max(self.params, 1):11.2f}" for part in parts)
            lines.append(f"{row.name:{width}}{figures}{_readable(row.total):>13}")
        return "\n".join(lines)


def estimate(
    model_or_params: nn.Module | Tensor | int | Iterable[Any],
    optimizer: type[FusedOptimizer] | FusedOptimizer | Offloaded,
    *,
    dtype: torch.dtype | None = None,
    grad_dtype: torch.dtype | None = None,
    offload: bool = False,
    **options: Any,
) -> Estimate:
    """Estimate the bytes of weights, gradients, masters and states: in the requested mode, in every other
    mode, and in plain torch.

    The optimizer creates its states on the meta device, so nothing is allocated. The estimate counts what
    persists between steps (for DTensors, on this rank). It excludes activations, temporaries, the model's
    buffers and the copies that ``torch.autocast`` makes in each forward pass.

    Args:
        model_or_params: a module (the meta device is fine), a tensor, a number of elements, or an iterable of
            tensors, named tensors, shapes or param groups. Frozen parameters count as weights only.
        optimizer: a class of :mod:`fusedamp.optim`, or an existing optimizer of these parameters. An existing
            :class:`fusedamp.optim.Offloaded` implies ``offload``.
        dtype: of the weights; default: unchanged, and FP32 for shapes.
        grad_dtype: of the gradients; default: that of each parameter.
        offload: estimate :class:`fusedamp.optim.Offloaded`: weights and gradients on the device and again on
            the host, masters and states on the host. The rows for plain torch have all on the device.
        options: for the constructor; for an existing optimizer, they override its groups' options.
    Returns: rows of bytes. The rows for plain torch are the same algorithm with FP32 weights, as under AMP;
        with FP32 masters and their FP32 gradients managed by the user; and with all states in the weights'
        dtype.
    Raises: TypeError or ValueError for unsupported arguments or modes.
    """
    if isinstance(optimizer, type) and issubclass(optimizer, FusedOptimizer):
        made, weights = plan(model_or_params, optimizer, options, dtype)
    elif isinstance(optimizer, FusedOptimizer):
        made, weights = optimizer, owned(model_or_params, optimizer, options, dtype)
    elif isinstance(optimizer, Offloaded):
        made, offload = optimizer._mirror.host, True
        weights = owned(model_or_params, optimizer, options, dtype)
    else:
        raise TypeError(
            f"[estimate] optimizer is {optimizer!r}; expected a class of fusedamp.optim, or an optimizer "
            "made from one. Pass such as fusedamp.optim.AdamW (for Offloaded, with offload=True); the table "
            "has rows for plain torch."
        )
    trained = [weight for weight in weights if weight.group is not None]
    if grad_dtype is not None:
        weights = [Weight(weight.meta, grad_dtype, weight.group) for weight in weights]
    has_masters = any(has_master(weight.meta, "fp32") for weight in trained)
    chosen = [tuple(_storage(weight.group).items()) for weight in trained if weight.group is not None]
    asked = dict(chosen[0]) if len(set(chosen)) == 1 else {}
    name = _label(asked, has_masters) if asked else "fusedamp: as in the groups"
    rows = {name: _row(name, made, weights, {}, offload)}
    for values in itertools.product(*STORAGE.values()):
        storage: dict[str, Any] = dict(zip(STORAGE, values, strict=True))
        name = _label(storage, has_masters)
        if name not in rows:
            try:
                rows[name] = _row(name, made, weights, storage | _TO_NEAREST, offload)
            except (TypeError, ValueError):  # the optimizer does not support this mode for these parameters
                continue
    count = sum(weight.meta.numel() for weight in weights)
    all_rows = (*rows.values(), *_plain_rows(made, weights))
    return Estimate(type(made).__name__, count, len(weights), all_rows)


def _row(
    name: str, optimizer: FusedOptimizer, weights: list[Weight], storage: dict[str, Any], offload: bool
) -> Memory:
    masters = states = 0
    known: dict[Any, tuple[int, int]] = {}  # large models repeat a few shapes
    for weight in weights:
        if weight.group is not None:
            kind = (weight.meta.shape, weight.meta.stride(), weight.meta.dtype, id(weight.group))
            if kind not in known:
                entry = optimizer.planned_state(weight.meta, {**weight.group, **storage})
                known[kind] = _bytes(entry.pop("master", ())), _bytes(entry)
            masters, states = masters + known[kind][0], states + known[kind][1]
    gradients = sum(w.meta.numel() * w.grad_dtype.itemsize for w in weights if w.group is not None)
    of_weights = _bytes([weight.meta for weight in weights])
    if not offload:
        return Memory(name, of_weights, gradients, masters, states)
    copies = _bytes([weight.meta for weight in weights if weight.group is not None])
    host = copies + gradients + masters + states
    name = name.replace("fusedamp", "fusedamp offloaded", 1)
    return Memory(name, of_weights + copies, 2 * gradients, masters, states, host)


def _plain_rows(optimizer: FusedOptimizer, weights: list[Weight]) -> list[Memory]:
    """Return the rows for plain torch, whose optimizers store states in the dtype of the weights."""
    amp, by_hand, narrow = ([0, 0, 0, 0] for _ in range(3))
    for weight in weights:
        size, count = weight.meta.element_size(), weight.meta.numel()
        if weight.group is None:
            for row in (amp, by_hand, narrow):
                row[0] += count * size
            continue
        wide = STATE_DTYPES[weight.meta.dtype]
        entry = optimizer.planned_state(weight.meta.to(wide), {**weight.group, **_PLAIN, **_TO_NEAREST})
        step = _bytes(entry.pop("step"))
        full, is_narrow = _bytes(entry), wide.itemsize > size
        for row, parts in (
            (amp, (wide.itemsize, wide.itemsize, 0)),
            (by_hand, (size, size + wide.itemsize, wide.itemsize) if is_narrow else (size, size, 0)),
            (narrow, (size, size, 0)),
        ):
            for i, part in enumerate(parts):
                row[i] += count * part
        amp[3] += full + step
        by_hand[3] += full + step
        narrow[3] += full * size // wide.itemsize + step
    rows = [Memory("plain torch" if narrow == amp else "plain torch: FP32 weights under AMP", *amp)]
    if narrow != amp:
        rows.append(Memory("plain torch: 16-bit weights, FP32 masters by hand", *by_hand))
        rows.append(Memory("plain torch: 16-bit weights and states", *narrow))
    return rows


def _storage(group: Group | None) -> dict[str, Any]:
    values = {option: (group or {}).get(option, _PLAIN[option]) for option in STORAGE}
    name_dtypes(values)
    return {option: _PLAIN[option] if value == "auto" else value for option, value in values.items()}


def _label(storage: dict[str, Any], has_masters: bool) -> str:
    """Format options as Python arguments; ``master_weights`` only if parameters can have masters."""
    shown = {k: v for k, v in storage.items() if has_masters or k != "master_weights"}
    options = (f'{k}="{v}"' if isinstance(v, str) else f"{k}={v}" for k, v in shown.items())
    return f"fusedamp: {', '.join(options)}" if shown else "fusedamp"


def _bytes(tree: Any) -> int:
    tensors = [plain(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _readable(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.4g} {unit}"
        count /= 1024
    return f"{count:,.2f} TiB"
