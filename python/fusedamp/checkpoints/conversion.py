"""Converts optimizer checkpoints of other libraries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops.checks import at
from ..optim.core.optimizer import FusedOptimizer
from ..optim.state.foreign import NO_RULE, ignored_options, recognized
from ..optim.state.formats import DEFAULTS, has_master
from .layouts import LAYOUTS, Layout, Saved


@torch.no_grad()
def convert(
    state_dict: dict[str, Any],
    optimizer: FusedOptimizer,
    source: str,
    fp32_weights: Sequence[Tensor] | None = None,
) -> dict[str, Any]:
    """Convert another library's optimizer checkpoint to a state dict that ``optimizer`` loads.

    Load the model's weights first: optimi's master weights are stored as their difference from the weights.
    The loss scale is not converted.

    Args:
        state_dict: what the other optimizer's ``state_dict()`` returned; read only.
        optimizer: the optimizer of :mod:`fusedamp.optim` that will load the result; read only. Its groups
            have the same parameters in the same order.
        source: "apex", "te" (TransformerEngine), "deepspeed", "bitsandbytes", "optimi" or "torchao". The
            library need not be installed, except torchao, whose tensors dequantize themselves.
        fp32_weights: FP32 values of all parameters, in the order of the optimizer's groups, for checkpoints
            without masters. They become the masters of 16-bit parameters. Shapes are checked; the order of
            parameters of one shape cannot be.
    Returns: a state dict for ``optimizer.load_state_dict``, which copies it. Tensors that need no conversion
        are those of ``state_dict``.
    Raises: ValueError naming an option that would change the rule, such as ``bias_correction=False`` or
        ``decouple_lr=True``, or a state that is missing.
    """
    if not isinstance(optimizer, FusedOptimizer):
        raise TypeError(
            f"[convert] optimizer is {type(optimizer).__name__}; expected an optimizer of fusedamp.optim, "
            "which loads the result. Construct it first; for Offloaded, one of its optimizer_class with the "
            "same groups, which needs no memory for this."
        )
    if source not in LAYOUTS:
        raise ValueError(
            f"[convert] source is {source!r}; expected one of {tuple(LAYOUTS)}. Checkpoints of torch.optim "
            "load as they are."
        )
    layout, kind = LAYOUTS[source], type(optimizer).__name__
    if not isinstance(optimizer, layout.kinds):
        known = " and ".join(f"fusedamp.optim.{some.__name__}" for some in layout.kinds)
        raise ValueError(
            f"[convert] optimizer is {kind}; expected {known} for checkpoints of {layout.library}, whose "
            "other optimizers have states of another meaning. Start with fresh states."
        )
    found = recognized(state_dict)
    if found not in (None, "apex", source):  # others store the step count as Apex does
        raise ValueError(
            f"[convert] got a checkpoint of {LAYOUTS[found].library} with source={source!r}; expected one of "
            f'{layout.library}. Pass source="{found}".'
        )
    saved = layout.unwrapped(state_dict, optimizer)
    _check_groups(saved, optimizer)
    masters = _by_parameter(fp32_weights, optimizer)
    state: dict[Any, dict[str, Any]] = {}
    groups = []
    for g, (theirs, ours) in enumerate(zip(saved["param_groups"], optimizer.param_groups, strict=True)):
        with at(f"[convert] group {g}"):
            named = _renamed(theirs, ours)
            groups.append(_options(named, ours, layout, kind))
        for index, param in zip(theirs["params"], ours["params"], strict=True):
            entry = saved["state"].get(index)
            if entry:
                with at(f"[convert] state[{index!r}]"):
                    new = _entry(layout, optimizer, ours, Saved(entry, named, param, ()))
                    if id(param) in masters and has_master(param, "fp32"):
                        new["master"] = masters[id(param)]
                    state[index] = new
    return {"state": state, "param_groups": groups}


def _entry(layout: Layout, optimizer: FusedOptimizer, group: dict[str, Any], saved: Saved) -> dict[str, Any]:
    specs = [spec for spec in optimizer.states if spec.of is None or spec.of(saved.param, group)]
    saved = saved._replace(names=tuple(spec.name for spec in specs))
    new = layout.states(saved)
    if saved.step is not None:
        new["step"] = saved.step
    required = [spec.name for spec in specs if spec.required]
    if any(spec.required and spec.count is None for spec in specs):
        required.insert(0, "step")
    missing = [name for name in required if name not in new]
    if missing:
        raise ValueError(
            f"has {sorted(saved.entry)}, which gives no {missing}; expected the states of "
            f"{type(optimizer).__name__} as {layout.library} stores them. Pass the library that made it as "
            "source, and an optimizer of the same kind."
        )
    return new


def _check_groups(saved: dict[str, Any], optimizer: FusedOptimizer) -> None:
    if not {"state", "param_groups"} <= saved.keys():
        raise ValueError(
            f"[convert] got a dict with keys {sorted(map(str, saved))}; expected 'state' and 'param_groups'. "
            "Pass what an optimizer's state_dict() returned."
        )
    if any("master_weights" in group for group in saved["param_groups"]):
        raise ValueError(
            "[convert] got a checkpoint of fusedamp; expected one of another library. Load it as it is."
        )
    theirs = [len(group["params"]) for group in saved["param_groups"]]
    ours = [len(group["params"]) for group in optimizer.param_groups]
    if theirs != ours:
        raise ValueError(
            f"[convert] the checkpoint has groups of {theirs} parameters; expected {ours}, as in the "
            "optimizer. Make the same groups."
        )


def _by_parameter(weights: Sequence[Tensor] | None, optimizer: FusedOptimizer) -> dict[int, Tensor]:
    if weights is None:
        return {}
    params = [param for group in optimizer.param_groups for param in group["params"]]
    shapes = [list(weight.shape) for weight in weights]
    if shapes != [list(param.shape) for param in params]:
        raise ValueError(
            f"[convert] fp32_weights has {len(shapes)} tensors, which do not have the shapes of the "
            f"optimizer's {len(params)} parameters in order; expected one for each, group by group. Pass "
            "[weights[names[p]] for group in optimizer.param_groups for p in group['params']], where names "
            "is {p: name for name, p in model.named_parameters()}."
        )
    return {id(param): weight.detach() for param, weight in zip(params, weights, strict=True)}


def _renamed(theirs: dict[str, Any], ours: dict[str, Any]) -> dict[str, Any]:
    """Return the saved group with our names of options, and numbers for tensors."""
    named = {name: value.item() if _is_number(value) else value for name, value in theirs.items()}
    if "beta1" in named:
        named["betas"] = (named.pop("beta1"), named.pop("beta2"))
    if "decouple_wd" in named:
        decoupled = named.pop("decouple_wd")
        if decoupled != ours["decoupled_weight_decay"] and named.get("weight_decay"):
            raise ValueError(
                f"decouple_wd is {decoupled}; expected {ours['decoupled_weight_decay']}, as in the "
                "optimizer. Use fusedamp.optim.AdamW for True and fusedamp.optim.Adam for False."
            )
    return named


def _is_number(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1


def _options(named: dict[str, Any], ours: dict[str, Any], layout: Layout, kind: str) -> dict[str, Any]:
    """Return the saved options that our group has; raises for others that would change the rule."""
    lost = {
        name: value
        for name, value in ignored_options(named, ours).items()
        if name not in layout.neutral or (layout.neutral[name] and value not in layout.neutral[name])
    }
    if lost:
        raise ValueError(
            f"has {', '.join(f'{name}={value!r}' for name, value in lost.items())}, which {kind} does not "
            "have; expected options of the same rule. If other means give the same effect, remove them from "
            "the checkpoint's group."
        )
    kept = (ours.keys() - DEFAULTS.keys()) | (NO_RULE - {"step"})
    return {name: value for name, value in named.items() if name in kept}
