"""Other libraries' options and checkpoint layouts: what a load or a constructor meets, by name."""

from __future__ import annotations

from typing import Any, NoReturn

from torch import Tensor

# Keys that schedulers, trainers and torch's optimizers add to groups; they don't affect the update rule.
NO_RULE = {
    *("params", "param_names", "name", "initial_lr", "max_lr", "min_lr", "base_lr", "swa_lr", "lr_scale"),
    *("max_momentum", "min_momentum", "base_momentum", "step", "use_orig_params"),
    *("foreach", "fused", "capturable", "differentiable", "maximize"),
}
# Options of other optimizers, and their values without effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "bias_correction": (True,),
    "correct_bias": (True,),
    "decoupled_weight_decay": (),
    "decouple_lr": (False,),
    "max_grad_norm": (None, 0, 0.0, float("inf")),
    "max_norm": (None, 0, 0.0, float("inf")),
    "amsgrad": (False,),
    "nesterov": (False,),
    "momentum": (0,),
    "dampening": (0,),
}

# What other libraries store to make 16-bit weights more precise: FlashOptim, optimi, AnyPrecisionAdamW.
FOREIGN_STATES = {"error_bits", "kahan_comp", "compensation"}

# Arguments of other libraries' constructors, and what to write here.
_NOT_8_BIT = 'Use state_dtype="int8", which applies to every tensor of the group, in blocks of 128 elements.'
_NO_RELEASE = "Gradient release is not supported: leave it out."
_NO_OFFLOAD = "Paged and offloaded states are not supported: leave it out."
_CLIP = "Leave it out, and call scaler.clip_grad_norm_(optimizer, max_norm) before the step."
WAYS_OUT: dict[str, str] = {
    "adam_w_mode": "Use fusedamp.optim.AdamW for True and fusedamp.optim.Adam for False.",
    "bias_correction": "Leave out True, which is the rule here; False is not supported.",
    "correct_bias": "Leave out True, which is the rule here; False is not supported.",
    "set_grad_none": "Leave it out: zero_grad(set_to_none=True) is the default.",
    "store_param_remainders": 'Use master_weights="split", which stores the same bits.',
    "master_weight_dtype": 'Masters are FP32: use master_weights="fp32", or "split" for half the memory.',
    "master_weight_bits": 'Use master_weights="split" for 24 and 32 bits, and "none" for None.',
    "exp_avg_dtype": "Use state_dtype=torch.bfloat16, which applies to all states.",
    "exp_avg_sq_dtype": "Use state_dtype=torch.bfloat16, which applies to all states.",
    "use_decoupled_grad": "Leave it out, and put such gradients into param.main_grad.",
    "optim_bits": 'Use state_dtype="int8" for 8, and leave out 32.',
    "min_8bit_size": _NOT_8_BIT + " Put small tensors into a group of their own.",
    "block_size": _NOT_8_BIT,
    "block_wise": _NOT_8_BIT,
    "percentile_clipping": _CLIP,
    "max_grad_norm": _CLIP,
    "max_unorm": "This is another rule; leave it out, or use the trust ratio of fusedamp.optim.LAMB.",
    "use_nvlamb": "Leave it out: every parameter is adapted; adapt=False in a group turns that off.",
    "is_paged": _NO_OFFLOAD,
    "bf16_stochastic_round": 'Use master_weights="none", stochastic_rounding=True.',
    "kahan_sum": 'Use master_weights="split", whose masters are exact.',
    "decouple_lr": "Leave out False; decay that does not depend on lr is not supported.",
    "gradient_release": _NO_RELEASE,
    "triton": "Leave it out: the step is always fused.",
}

# bitsandbytes: names of its states, and the key under which its checkpoints nest them.
BNB_STATES = tuple(f"state{n}" for n in (1, 2))
BNB_NESTED = "__bnb_optimizer_quant_state__"
# DeepSpeed: keys of its wrappers' checkpoints, flat and sharded.
DEEPSPEED_FLAT = "fp32_groups_flat"
DEEPSPEED = {DEEPSPEED_FLAT, "fp32_groups", "single_partition_of_fp32_groups", "base_optimizer_state"}


def ignored_options(saved: dict[str, Any], group: dict[str, Any]) -> dict[str, Any]:
    """Return the saved options that ``group`` does not have and that would change its steps."""
    unknown = {name: value for name, value in saved.items() if name not in group and name not in NO_RULE}
    return {
        name: value
        for name, value in unknown.items()
        if isinstance(value, (bool, int, float)) and value not in NEUTRAL.get(name, ())
    }


def recognized(state_dict: dict[str, Any]) -> str | None:
    """Return the library whose checkpoint layout ``state_dict`` has, by its name for
    :func:`fusedamp.checkpoints.convert`; None for a layout that loads as it is."""
    if state_dict.keys() & DEEPSPEED:
        return "deepspeed"
    state, groups = state_dict.get("state"), state_dict.get("param_groups")
    entries = (
        [entry for entry in state.values() if isinstance(entry, dict)] if isinstance(state, dict) else []
    )
    names = {name for entry in entries for name in entry}
    if names & {BNB_NESTED, *BNB_STATES}:
        return "bitsandbytes"
    if "master_param" in names:
        return "te"
    if any(isinstance(value, Tensor) and hasattr(value, "codes") for e in entries for value in e.values()):
        return "torchao"
    options = {name for group in groups or () for name in group}
    if {"beta1", "kahan_sum"} <= options:
        return "optimi"
    if entries and "step" not in names and {"step", "bias_correction"} <= options:
        return "apex"
    return None


def refuse_foreign(where: str, state_dict: dict[str, Any]) -> None:
    """Raise if ``state_dict`` has the layout of another library."""
    source = recognized(state_dict)
    if source is not None:
        _refuse_layout(where, source)


def _refuse_layout(where: str, source: str) -> NoReturn:
    raise ValueError(
        f"{where} got a checkpoint in the layout of {source!r}; expected one of this optimizer or its "
        f"torch.optim counterpart. Load fusedamp.checkpoints.convert(state_dict, optimizer, "
        f'source="{source}").'
    )
