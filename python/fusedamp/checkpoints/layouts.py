"""Layouts of other libraries' optimizer checkpoints, one row each, read without importing the libraries."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..optim.adam import Adam
from ..optim.core.optimizer import FusedOptimizer
from ..optim.lion import Lion
from ..optim.state.foreign import BNB_NESTED, BNB_STATES, DEEPSPEED_FLAT
from ..tensors.layout import fitted

Entry = dict[str, Any]
_BNB_BLOCKS = (256, 2048)  # elements that share a scale, in newer and in older versions


class Saved(NamedTuple):
    """The saved state of one parameter, its saved group, and the names of our states in order."""

    entry: Entry
    group: dict[str, Any]
    param: Tensor
    names: tuple[str, ...]

    @property
    def step(self) -> Any:
        return self.entry.get("step", self.group.get("step"))


@dataclass(frozen=True)
class Layout:
    """How to read one library's checkpoints.

    Args:
        library: its name, for messages.
        states: function from a parameter's saved state to states and master under our names.
        unwrapped: function from the whole checkpoint to one with ``state`` and ``param_groups``.
        kinds: our optimizers whose counterparts' states are known.
        neutral: options of the library that don't change the rule -> their values without effect; an empty
            tuple stands for all values.
    """

    library: str
    states: Callable[[Saved], Entry]
    unwrapped: Callable[[dict[str, Any], FusedOptimizer], dict[str, Any]] = lambda saved, _: saved
    kinds: tuple[type[FusedOptimizer], ...] = (FusedOptimizer,)
    neutral: dict[str, tuple[Any, ...]] = field(default_factory=dict)


def _same_names(saved: Saved) -> Entry:
    """States under torch's names, and a master that the user added; tensor subclasses are dequantized."""
    found = {
        name: saved.entry[name] for name in (*saved.names, "master") if saved.entry.get(name) is not None
    }
    return {name: value.dequantize() if hasattr(value, "codes") else value for name, value in found.items()}


def _te(saved: Saved) -> Entry:
    """TransformerEngine: the master is FP32, or the int16 remainder of a BF16 weight, which has the bits of
    our split masters."""
    new, master = _same_names(saved), saved.entry.get("master_param")
    if master is None:
        return new
    if master.dtype == torch.int16 and saved.param.dtype != torch.bfloat16:
        raise ValueError(
            f"has the int16 remainder of a BF16 weight, for a parameter of dtype {saved.param.dtype}; "
            "expected torch.bfloat16. Load it into a BF16 model."
        )
    return {**new, "master": master}


def _optimi(saved: Saved) -> Entry:
    """optimi stores averages with the bias correction applied, and the rounding error of 16-bit weights."""
    new, step = _same_names(saved), float(saved.step or 0)
    for name, beta in zip(saved.names, saved.group["betas"], strict=False):
        if name in new:
            new[name] = new[name].float() * (1 - beta**step)
    error = saved.entry.get("kahan_comp")
    if error is not None and error.dtype == saved.param.dtype:
        new["master"] = fitted(saved.param, saved.param) + fitted(error, saved.param)
    return new


def _bitsandbytes(saved: Saved) -> Entry:
    entry = {**saved.entry, **saved.entry.get(BNB_NESTED, {})}
    pairs = zip(saved.names, enumerate(BNB_STATES, 1), strict=False)
    return {name: _bnb_values(entry, key, n) for name, (n, key) in pairs if entry.get(key) is not None}


def _bnb_values(entry: Entry, key: str, n: int) -> Tensor:
    """Return state ``n``: floats, or 8-bit indices into a map of 256 values, with one scale per block."""
    codes: Tensor = entry[key]
    if codes.dtype != torch.uint8:
        return codes
    values: Tensor | None = entry.get(f"qmap{n}")
    scales: Tensor | None = entry.get(f"absmax{n}")
    if values is None or scales is None:
        raise ValueError(
            f"has {key!r} in 8 bits without 'qmap{n}' and 'absmax{n}'; expected the scales of its blocks. "
            "Non-blockwise 8-bit states are not supported: start with fresh states."
        )
    fitting = [block for block in _BNB_BLOCKS if -(-codes.numel() // block) == scales.numel()]
    if not fitting:
        raise ValueError(
            f"has {key!r} of {codes.numel()} elements with {scales.numel()} scales in 'absmax{n}'; expected "
            "one per block of 256. Load an intact checkpoint."
        )
    scale = scales.repeat_interleave(fitting[0])[: codes.numel()]
    return (values[codes.flatten().long()] * scale).view(codes.shape)


def _cut(state_dict: dict[str, Any], optimizer: FusedOptimizer) -> dict[str, Any]:
    """DeepSpeed: cut the flat tensors of ``FP16_Optimizer``, one per group, into parameters."""
    if not {"optimizer_state_dict", DEEPSPEED_FLAT} <= state_dict.keys():
        if {"state", "param_groups"} <= state_dict.keys():
            return state_dict  # of DeepSpeedCPUAdam and FusedAdam themselves
        raise ValueError(
            f"[convert] got a DeepSpeed checkpoint with keys {sorted(map(str, state_dict))}; expected "
            f"'optimizer_state_dict' and {DEEPSPEED_FLAT!r}. Shards of ZeRO are not supported: convert them "
            "with DeepSpeed's ds_to_universal, or start with fresh states."
        )
    inner, masters = state_dict["optimizer_state_dict"], state_dict[DEEPSPEED_FLAT]
    groups = optimizer.param_groups
    if not len(inner["param_groups"]) == len(masters) == len(groups):
        raise ValueError(
            f"[convert] the checkpoint has {len(inner['param_groups'])} groups with {len(masters)} flat "
            f"tensors, and the optimizer {len(groups)} groups; expected the same. Make the same groups."
        )
    state: dict[int, Entry] = {}
    new_groups = []
    for g, (group, saved, master) in enumerate(zip(groups, inner["param_groups"], masters, strict=True)):
        flat = inner["state"].get(saved["params"][0], {})
        tensors = {name: value for name, value in flat.items() if _is_flat(value)} | {"master": master}
        rest = {name: value for name, value in flat.items() if not _is_flat(value)}
        ids = list(range(len(state), len(state) + len(group["params"])))
        pieces = {
            name: list(_pieces(f"group {g}", value, group["params"])) for name, value in tensors.items()
        }
        for i, index in enumerate(ids):
            state[index] = {**rest, **{name: piece[i] for name, piece in pieces.items()}} if flat else {}
        new_groups.append({**saved, "params": ids})
    return {"state": state, "param_groups": new_groups}


def _is_flat(value: Any) -> bool:
    return isinstance(value, Tensor) and value.dim() == 1


def _pieces(where: str, flat: Tensor, params: list[Tensor]) -> Iterator[Tensor]:
    wanted = sum(param.numel() for param in params)
    if flat.numel() < wanted:
        raise ValueError(
            f"[convert] {where}: a flat tensor of the checkpoint has {flat.numel()} elements; expected at "
            f"least {wanted}, those of the group's parameters. Pass an optimizer with the same parameters in "
            "each group."
        )
    begin = 0
    for param in params:
        yield flat[begin : begin + param.numel()].view(param.shape)
        begin += param.numel()


_ANY: tuple[Any, ...] = ()
LAYOUTS: dict[str, Layout] = {
    "apex": Layout("Apex", _same_names, neutral={"grad_averaging": (True,)}),
    "te": Layout("TransformerEngine", _te),
    "deepspeed": Layout("DeepSpeed", _same_names, _cut),
    # AdEMAMix has another alpha; Lion has an eps that it does not read.
    "bitsandbytes": Layout(
        "bitsandbytes",
        _bitsandbytes,
        kinds=(Adam, Lion),
        neutral={"eps": _ANY, "alpha": (0, None), "t_alpha": _ANY, "t_beta3": _ANY},
    ),
    "optimi": Layout(
        "optimi",
        _optimi,
        kinds=(Adam,),
        neutral={"kahan_sum": _ANY, "gradient_release": _ANY, "triton": _ANY, "setup": _ANY},
    ),
    "torchao": Layout("torchao", _same_names),
}
