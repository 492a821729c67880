"""Other libraries' spellings: those of storage options are taken, other arguments raise with a way out."""

import copy
import warnings

import pytest
import torch
from cases import CASES, make_params
from fusedamp import estimate, optim
from fusedamp.optim.state.foreign import WAYS_OUT

SPELLINGS = [
    ("master_weights", True, "fp32"),
    ("master_weights", False, "none"),
    ("master_weights", torch.float32, "fp32"),
    ("master_weights", "float32", "fp32"),
    ("state_dtype", "bfloat16", "bfloat16"),
    ("state_dtype", "torch.bfloat16", "bfloat16"),
    ("state_dtype", "bf16", "bfloat16"),
    ("state_dtype", "fp32", "float32"),
    ("state_dtype", "float", "float32"),
    ("state_dtype", "torch.float32", "float32"),
    ("state_dtype", torch.int8, "int8"),
]


@pytest.mark.parametrize(("option", "given", "name"), SPELLINGS, ids=str)
def test_spellings_of_storage(option, given, name):
    """Guards each way that an option comes in: constructor, group, later assignment, estimate."""
    params = make_params(torch.bfloat16, [(3,), (4,), (5,)])
    optimizer = optim.AdamW(
        [{"params": params[:1]}, {"params": params[1:2], option: given}], **{option: given}
    )
    optimizer.add_param_group({"params": params[2:], option: given})
    assert [group[option] for group in optimizer.param_groups] == [name] * 3
    assert optimizer.defaults[option] == name
    optimizer.param_groups[0][option] = given
    params[0].grad = torch.ones_like(params[0])
    optimizer.step()
    assert optimizer.param_groups[0][option] == name
    assert ("master" in optimizer.state[params[0]]) == (optimizer.param_groups[0]["master_weights"] != "none")
    optimizer.param_groups[0][option] = given
    assert optimizer.state_dict()["param_groups"][0][option] == name
    assert copy.deepcopy(optimizer).param_groups[0][option] == name
    rows = estimate(params, optim.AdamW, **{option: given}).rows
    assert rows[0] == estimate(params, optim.AdamW, **{option: name}).rows[0]


@pytest.mark.parametrize("case", [case for case in CASES if case.ours.can_compress], ids=str)
def test_every_optimizer_takes_them(case):
    params = make_params(torch.bfloat16, [(3,)])
    group = case.ours(params, **case.options, master_weights=False, state_dtype="fp32").param_groups[0]
    assert (group["master_weights"], group["state_dtype"]) == ("none", "float32")


@pytest.mark.parametrize(
    "wrong",
    [
        {"master_weights": 1},
        {"master_weights": 0},
        {"master_weights": None},
        {"master_weights": "bf16"},
        {"state_dtype": True},
        {"state_dtype": "fp8"},
        {"state_dtype": torch.float16},
        {"state_dtype": 8},
    ],
    ids=str,
)
def test_other_values_raise(wrong):
    ((name, _),) = wrong.items()
    with pytest.raises(ValueError, match=rf"{name} is .*; expected one of .* Use"):
        optim.AdamW(make_params(torch.bfloat16, [(3,)]), **wrong)


@pytest.mark.parametrize("name", WAYS_OUT)
def test_arguments_of_others_name_the_way_out(name):
    with pytest.raises(TypeError) as error:
        optim.SGD(make_params(torch.float32, [(3,)]), **{name: True})
    assert str(error.value) == f"SGD() got an unexpected keyword argument {name!r}. {WAYS_OUT[name]}"


def checkpoint(**options):
    params = make_params(torch.bfloat16, [(3,), (4,)])
    optimizer = optim.AdamW(params)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["param_groups"][0] |= options
    return params, saved


RULES = {"bias_correction": False, "decouple_lr": True, "max_grad_norm": 1.0, "caution": True}


@pytest.mark.parametrize("name", RULES)
def test_other_rules_are_warned_of(name):
    params, saved = checkpoint(**{name: RULES[name]})
    with pytest.warns(
        UserWarning, match=f"the checkpoint has {name}={RULES[name]!r}, which AdamW does"
    ) as seen:
        optim.AdamW(params).load_state_dict(saved)
    assert [warning.filename for warning in seen] == [__file__]


def test_neutral_options_are_silent():
    params, saved = checkpoint(bias_correction=True, decouple_lr=False, max_grad_norm=0.0, initial_lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optim.AdamW(params).load_state_dict(saved)


def test_tensors_of_others_are_dropped():
    """Guards later checkpoints: FlashOptim's and optimi's rounding errors would stay in them for ever."""
    params, saved = checkpoint()
    for entry in saved["state"].values():
        entry["error_bits"] = torch.zeros(3, dtype=torch.int8)
        entry["kahan_comp"] = None
    saved["state"][1]["mine"] = torch.ones(2)
    optimizer = optim.AdamW(params)
    with pytest.warns(UserWarning, match="has 'error_bits' of 2 parameters, which AdamW .* dropped") as seen:
        optimizer.load_state_dict(saved)
    assert [warning.filename for warning in seen] == [__file__]
    assert optimizer.state[params[0]].keys() == {"step", "exp_avg", "exp_avg_sq", "master"}
    assert torch.equal(optimizer.state[params[1]]["mine"], torch.ones(2))
    assert "error_bits" in saved["state"][0]
