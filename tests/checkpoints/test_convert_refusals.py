"""What convert and load_state_dict refuse of other libraries' checkpoints, by name and with a way out."""

import re

import pytest
import torch
from foreign_layouts import LAYOUTS, apex, bnb, deepspeed, half, optimi, reference, te
from fusedamp import optim
from fusedamp.checkpoints import convert


def test_te_remainders_need_bf16_weights():
    params, optimizer = reference()
    mine = half(params, torch.float16)
    ours = optim.AdamW(mine, master_weights="split")
    with pytest.raises(ValueError, match=r"^\[convert\] state\[0\] has the int16 remainder .* BF16 model"):
        convert(te(params, optimizer, True), ours, "te")


def test_deepspeed_refusals():
    params, optimizer = reference()
    saved = deepspeed(params, optimizer, padding=0)
    ours = optim.AdamW(half(params, torch.float16))
    short = {**saved, "fp32_groups_flat": [saved["fp32_groups_flat"][0][:-1]]}
    with pytest.raises(ValueError, match=r"group 0: a flat tensor .* expected at least \d+"):
        convert(short, ours, "deepspeed")
    with pytest.raises(ValueError, match=r"1 groups with 2 flat tensors"):
        convert({**saved, "fp32_groups_flat": saved["fp32_groups_flat"] * 2}, ours, "deepspeed")
    with pytest.raises(ValueError, match=r"Shards of ZeRO are not supported"):
        convert({"single_partition_of_fp32_groups": [], "zero_stage": 1}, ours, "deepspeed")


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda e: {"state1": e["state1"].to(torch.uint8), "max1": 1.0}, r"Non-blockwise 8-bit states"),
        (
            lambda e: {
                "state1": torch.zeros(9, dtype=torch.uint8),
                "qmap1": torch.zeros(256),
                "absmax1": torch.ones(5),
            },
            r"state1' of 9 elements with 5 scales",
        ),
    ],
)
def test_bitsandbytes_refusals(change, text):
    params, optimizer = reference()
    ours = optim.AdamW(half(params, torch.float32))
    with pytest.raises(ValueError, match=text):
        convert(bnb(params, optimizer, True, change), ours, "bitsandbytes")


RULES = [
    ("apex", {"bias_correction": False}),
    ("apex", {"max_grad_norm": 1.0}),
    ("te", {"bias_correction": False}),
    ("optimi", {"decouple_lr": True}),
    ("bitsandbytes", {"alpha": 5.0}),
]


@pytest.mark.parametrize(("source", "option"), RULES, ids=str)
def test_other_rules_are_refused(source, option):
    params, optimizer = reference()
    made = {"apex": apex, "te": apex, "optimi": optimi, "bitsandbytes": bnb}[source]
    extra = {"optimi": (torch.float32,), "bitsandbytes": (True,)}.get(source, ())
    saved = made(params, optimizer, *extra)
    saved["param_groups"][0] |= option
    ours = optim.AdamW(half(params, torch.float32))
    ((name, value),) = option.items()
    with pytest.raises(
        ValueError, match=rf"^\[convert\] group 0 has {name}={value}, which AdamW does not have"
    ):
        convert(saved, ours, source)


def test_coupled_decay_is_refused():
    params, optimizer = reference()
    saved = optimi(params, optimizer, torch.float32, decouple_wd=False)
    with pytest.raises(ValueError, match=r"group 0 decouple_wd is False; expected True"):
        convert(saved, optim.AdamW(half(params, torch.float32)), "optimi")
    convert(saved, optim.Adam(half(params, torch.float32)), "optimi")


def test_states_in_groups_are_refused():
    """Guards Apex's NovoGrad, which keeps norms per group and dtype."""
    params, optimizer = reference()
    saved = apex(params, optimizer, exp_avg_sq=[torch.ones(6), torch.ones(0)])
    for entry in saved["state"].values():
        del entry["exp_avg_sq"]
    with pytest.raises(
        ValueError, match=r"gives no \['exp_avg_sq'\]; expected the states of NovoGrad as Apex"
    ):
        convert(saved, optim.NovoGrad(half(params, torch.float32)), "apex")


def test_other_refusals():
    params, optimizer = reference()
    saved, ours = apex(params, optimizer), optim.AdamW(half(params, torch.float32))
    with pytest.raises(ValueError, match=re.escape("source is 'amp'; expected one of ('apex', 'te', ")):
        convert(saved, ours, "amp")
    with pytest.raises(TypeError, match=r"optimizer is AdamW; expected an optimizer of fusedamp"):
        convert(saved, torch.optim.AdamW(params), "apex")
    with pytest.raises(
        ValueError, match=r"optimizer is SGD; expected fusedamp.optim.Adam and fusedamp.optim.Lion"
    ):
        convert(saved, optim.SGD(params), "bitsandbytes")
    with pytest.raises(ValueError, match=r"groups of \[6\] parameters; expected \[1\]"):
        convert(saved, optim.AdamW(params[:1]), "apex")
    with pytest.raises(ValueError, match=r"fp32_weights has 5 tensors"):
        convert(saved, ours, "apex", params[1:])
    del saved["state"][0]["exp_avg_sq"]
    with pytest.raises(ValueError, match=r"state\[0\] has .* gives no \['exp_avg_sq'\]"):
        convert(saved, ours, "apex")
    with pytest.raises(ValueError, match=r"keys \['a'\]; expected 'state' and 'param_groups'"):
        convert({"a": 1}, ours, "te")
    with pytest.raises(ValueError, match=r"got a checkpoint of fusedamp; .* Load it as it is"):
        convert(optimizer.state_dict(), ours, "apex")


@pytest.mark.parametrize("source", LAYOUTS)
def test_loads_name_convert(source):
    """Guards the way out: load_state_dict recognizes each layout, and changes nothing."""
    params, optimizer = reference()
    ours = optim.AdamW(half(params, torch.bfloat16))
    with pytest.raises(ValueError, match=re.escape(f'.convert(state_dict, optimizer, source="{source}")')):
        ours.load_state_dict(LAYOUTS[source](params, optimizer))
    assert not ours.state


@pytest.mark.parametrize("source", LAYOUTS)
def test_a_wrong_source_is_named(source):
    params, optimizer = reference()
    saved, ours = LAYOUTS[source](params, optimizer), optim.AdamW(half(params, torch.bfloat16))
    for other in LAYOUTS:
        if source not in (other, "apex"):
            with pytest.raises(ValueError, match=rf'with source=\'{other}\'.* Pass source="{source}"'):
                convert(saved, ours, other)
