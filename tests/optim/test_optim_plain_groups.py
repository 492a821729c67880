"""Groups hold plain values, loading changes no key of them, and what a checkpoint asks for in vain is said.

Guards what walks groups: JSON, torch.distributed.checkpoint, torch.load(weights_only=True), other languages.
"""

import copy
import inspect
import io
import json
import math
import pickle
import warnings

import pytest
import torch
from cases import COMPOSED, MAIN, kept, make_params, set_grads
from fusedamp import optim
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

ALL = [*MAIN, *COMPOSED]
BY_DTYPE = [
    (torch.bfloat16, "bfloat16"),
    ("bfloat16", "bfloat16"),
    (torch.float32, "float32"),
    ("int8", "int8"),
]


def stepped(case, **options):
    params = make_params(torch.bfloat16)
    optimizer = case.ours(params, **case.options, **options)
    set_grads(params, 0)
    optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("case", ALL, ids=str)
def test_groups_and_defaults_are_json(case):
    _, optimizer = stepped(case)
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    for values in (optimizer.defaults, *groups):
        assert json.loads(json.dumps(values)).keys() == values.keys()


@pytest.mark.parametrize(("given", "name"), BY_DTYPE, ids=str)
def test_dtypes_are_named_wherever_they_come_from(given, name):
    """The constructor, a group, a user's assignment, a checkpoint and a pickle of dtypes."""
    params = make_params(torch.float32)
    optimizer = optim.AdamW(params, state_dtype=given)
    assert optimizer.defaults["state_dtype"] == optimizer.param_groups[0]["state_dtype"] == name
    other = optim.AdamW([{"params": params, "state_dtype": given}])
    assert other.param_groups[0]["state_dtype"] == name
    late = optim.AdamW(params)
    late.param_groups[0]["state_dtype"] = given
    assert late.state_dict()["param_groups"][0]["state_dtype"] == name
    late.param_groups[0]["state_dtype"] = given
    set_grads(params, 0)
    late.step()
    assert late.param_groups[0]["state_dtype"] == name
    old = pickle.loads(pickle.dumps(late))
    old.param_groups[0]["state_dtype"] = old.defaults["state_dtype"] = given
    old = pickle.loads(pickle.dumps(old))
    assert old.param_groups[0]["state_dtype"] == old.defaults["state_dtype"] == name
    saved = copy.deepcopy(late.state_dict())
    saved["param_groups"][0]["state_dtype"] = given
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["state_dtype"] == name


def test_muon_takes_the_name_of_a_dtype():
    ends = []
    for dtype in (torch.float16, "float16"):
        param = torch.nn.Parameter(torch.eye(4))
        optimizer = optim.Muon([param], ns_dtype=dtype)
        param.grad = torch.arange(16.0).view(4, 4)
        optimizer.step()
        ends.append(param.detach())
        assert optimizer.param_groups[0]["ns_dtype"] == "float16"
    assert torch.equal(*ends)


COPIES = {
    "load": lambda o: o.load_state_dict(o.state_dict()) or o,
    "deepcopy": copy.deepcopy,
    "pickle": lambda o: pickle.loads(pickle.dumps(o)),
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("case", ALL, ids=str)
def test_no_key_comes_or_goes(case, copied):
    _, optimizer = stepped(case)
    optimizer.param_groups[0]["layer"] = 3
    keys, defaults = list(optimizer.param_groups[0]), list(optimizer.defaults)
    for _ in range(2):
        optimizer = copied(optimizer)
        assert set(optimizer.param_groups[0]) == set(keys)
        assert list(optimizer.defaults) == defaults
        assert optimizer.param_groups[0]["layer"] == 3


@pytest.mark.parametrize("options", [{"full_state_dict": True}, {"cpu_offload": True}], ids=str)
@pytest.mark.parametrize("flatten", [False, True])
@pytest.mark.parametrize("case", ALL, ids=str)
def test_torchs_state_dict_functions(case, flatten, options):
    """Gathered or offloaded, twice in one process, then continued bit for bit."""
    if flatten and "full_state_dict" in options:
        options = {"cpu_offload": True}  # torch does not load what it flattens and gathers, of no optimizer
    settings = StateDictOptions(flatten_optimizer_state_dict=flatten, **options)

    def build():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Linear(6, 3)).bfloat16()
        return model, case.ours(model.parameters(), **case.options)

    def train(model, optimizer, seed):
        set_grads(list(model.parameters()), seed)
        optimizer.step()

    (model, optimizer), (resumed, other) = build(), build()
    train(model, optimizer, 0)
    for _ in range(2):
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=settings))
        resumed.load_state_dict(model.state_dict())
        set_optimizer_state_dict(resumed, other, saved, options=settings)
    train(model, optimizer, 1)
    train(resumed, other, 1)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), resumed.parameters(), strict=True))


def load(ours, saved, **options):
    optimizer = ours(make_params(torch.float32), **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.load_state_dict(saved)
    return optimizer, [str(w.message) for w in caught]


FOREIGN = {
    "bias_correction": (optim.AdamW, {"bias_correction": False}, True),
    "bias_correction on": (optim.AdamW, {"bias_correction": True}, False),
    "decouple_lr": (optim.AdamW, {"decouple_lr": True}, True),
    "max_grad_norm": (optim.AdamW, {"max_grad_norm": 1.0}, True),
    "no max_grad_norm": (optim.AdamW, {"max_grad_norm": 0.0}, False),
    "another optimizer's": (optim.SGD, {"rho": 0.05}, True),
    "a scheduler's": (optim.AdamW, {"initial_lr": 0.5, "max_lr": 1.0}, False),
    "names": (optim.AdamW, {"param_names": list("abcdefghij")}, False),
}


@pytest.mark.parametrize(("ours", "extra", "warns"), FOREIGN.values(), ids=FOREIGN)
def test_options_that_cannot_be_obeyed_are_named(ours, extra, warns):
    """Kept in the group, as torch keeps them, and never ignored without a word."""
    saved = copy.deepcopy(ours(make_params(torch.float32)).state_dict())
    saved["param_groups"][0] |= extra
    optimizer, messages = load(ours, saved)
    assert extra.items() <= optimizer.param_groups[0].items()
    assert len(messages) == warns
    for message in messages:
        assert message.startswith(f"[{ours.__name__}.load_state_dict] group 0: the checkpoint has ")
        assert all(f"{name}={value!r}" in message for name, value in extra.items())


@pytest.mark.parametrize("case", [case for case in ALL if case.torch is not None], ids=str)
def test_torchs_own_checkpoints_warn_of_nothing(case):
    params = make_params(torch.float32)
    theirs = case.torch(params, **case.options)
    set_grads(params, 0)
    theirs.step()
    assert not load(case.ours, theirs.state_dict(), **case.options)[1]


def test_subclasses_with_options_of_their_own():
    class Mine(optim.Adam):
        def __init__(self, params, master_weights="split", **options):
            super().__init__(params, master_weights=master_weights, **options)

    assert list(inspect.signature(Mine).parameters) == ["params", "master_weights", "options"]
    param = torch.nn.Parameter(torch.ones(3).bfloat16())
    optimizer = Mine([param], lr=0.1, rounding_seed=3)
    param.grad = torch.ones_like(param)
    optimizer.step()
    assert optimizer.state[param]["master"].bits.dtype == torch.int16

    class Positional(optim.SGD):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)

    assert Positional([param], 0.5).defaults["lr"] == 0.5
    assert "rounding_seed" in inspect.signature(optim.SGD).parameters


def test_adagrad_shares_its_states():
    """As torch's: they exist from the start, and processes that share them see each other's steps."""
    param = torch.nn.Parameter(torch.ones(4))
    optimizer, twin = optim.Adagrad([param]), torch.optim.Adagrad([param])
    assert optimizer.state[param].keys() == twin.state[param].keys()
    assert torch.equal(optimizer.state[param]["sum"], twin.state[param]["sum"])
    optimizer.share_memory()
    assert all(value.is_shared() for value in optimizer.state[param].values())
    held = dict(optimizer.state[param])
    for _ in range(3):
        param.grad = torch.ones(4)
        optimizer.step()
    assert all(held[name] is value and value.is_shared() for name, value in optimizer.state[param].items())
    assert held["step"] == 3
    assert (held["sum"] == 3).all()


@pytest.mark.parametrize("options", [{"state_dtype": "int8"}, {"master_weights": "split"}], ids=str)
def test_adagrad_shares_states_of_every_format(options):
    param = torch.nn.Parameter(torch.ones(4).bfloat16())
    optimizer = optim.Adagrad([param], **options)
    optimizer.share_memory()
    assert all(t.is_shared() for t in kept(optimizer.state[param]).values())


@pytest.mark.parametrize("case", ALL, ids=str)
def test_a_shared_step_count_stays_shared(case):
    params, optimizer = stepped(case)
    counts = [optimizer.state[p]["step"].share_memory_() for p in params]
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    assert all(optimizer.state[p]["step"] is count for p, count in zip(params, counts, strict=True))
    assert {count.item() for count in counts} == {4.0}


def test_momentum_that_starts_late_keeps_a_shared_count():
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.SGD([param], lr=0.1)
    param.grad = torch.ones(3)
    optimizer.step()
    count = optimizer.state[param]["step"].share_memory_()
    optimizer.param_groups[0]["momentum"] = 0.9
    optimizer.step()
    assert optimizer.state[param]["step"] is count
    assert count == 1  # the buffer has seen one gradient


TOO_LARGE = [
    (optim.AdamW, "lr", 1e39),
    (optim.AdamW, "weight_decay", 1e39),
    (optim.AdamW, "eps", 10**400),
    (optim.SGD, "momentum", 1e39),
    (optim.SGD, "lr", torch.tensor(1e39, dtype=torch.float64)),
    (optim.LAMB, "trust_clip", 1e39),
    (optim.Muon, "adamw_eps", math.inf),
    (optim.AdamW, "rounding_seed", 2**31),
    (optim.AdamW, "rounding_seed", True),
]


@pytest.mark.parametrize(("ours", "name", "value"), TOO_LARGE, ids=str)
def test_numbers_that_fp32_cannot_hold_are_refused(ours, name, value):
    """0 times an infinite rate is NaN: a weight without gradient would be lost."""
    param = torch.nn.Parameter(torch.ones(3, 3))
    with pytest.raises(ValueError, match=rf"\[{ours.__name__}\].* {name} is "):
        ours([param], **{name: value})
    optimizer = ours([param])
    optimizer.param_groups[0][name] = value
    param.grad = torch.zeros(3, 3)
    with pytest.raises(ValueError, match=rf"group 0: {name} is "):
        optimizer.step()
    assert (param == 1).all()


def test_saved_as_weights_only():
    _params, optimizer = stepped(MAIN[0], state_dtype=torch.bfloat16)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    optimizer.load_state_dict(torch.load(file, weights_only=True))
