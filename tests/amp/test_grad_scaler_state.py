"""Checkpoints and copies of the scaler: torch's entries, exchanged with torch's scaler both ways."""

import copy
import math
import pickle

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from on_device import DEVICE


def iterate(scaler, optimizer, factor=1.0):
    """Run one iteration; all gradients are ``factor``."""
    optimizer.zero_grad()
    params = optimizer.param_groups[0]["params"]
    scaler.scale(sum(p.float().sum() for p in params) * factor).backward()
    scaler.step(optimizer)
    scaler.update()


def make(cls=torch.optim.SGD, scaler_class=GradScaler, **options):
    param = torch.ones(3, requires_grad=True)
    return scaler_class(DEVICE, **{"init_scale": 8.0, **options}), cls([param], lr=0.1)


def test_state_dicts_go_both_ways():
    ours, optimizer = make(growth_interval=5)
    for _ in range(7):
        iterate(ours, optimizer)
    state = ours.state_dict()
    floats = ("scale", "growth_factor", "backoff_factor")
    kinds = {**dict.fromkeys(floats, float), "growth_interval": int, "_growth_tracker": int}
    assert {key: type(value) for key, value in state.items()} == kinds
    theirs = torch.amp.GradScaler(DEVICE)
    theirs.load_state_dict(state)
    assert theirs.state_dict() == state
    fresh = GradScaler(DEVICE)
    fresh.load_state_dict(theirs.state_dict())  # lazily, before the first scale()
    assert fresh.state_dict() == state
    iterate(fresh, optimizer)
    assert fresh._get_growth_tracker() == state["_growth_tracker"] + 1
    tensors = (ours._scale, ours._growth_tracker)
    ours.load_state_dict({**state, "scale": 4.0, "_growth_tracker": 1})  # in place, once there
    assert (ours._scale, ours._growth_tracker) == tensors
    assert (ours.get_scale(), ours._get_growth_tracker()) == (4.0, 1)


def test_load_state_dict_refuses_and_changes_nothing():
    scaler, optimizer = make()
    iterate(scaler, optimizer)
    state = scaler.state_dict()
    with pytest.raises(RuntimeError, match="The source state dict is empty"):
        scaler.load_state_dict({})
    for key in state:
        with pytest.raises(KeyError, match=key):
            scaler.load_state_dict({k: v for k, v in state.items() if k != key})
    for key, value in {
        "scale": math.nan,
        "growth_factor": 0.0,
        "backoff_factor": 2.0,
        "growth_interval": 0,
    }.items():
        with pytest.raises(ValueError, match=key):
            scaler.load_state_dict({**state, key: value})
    assert scaler.state_dict() == state
    scaler.load_state_dict({**state, "scale": 0.0})  # torch's scaler falls that low
    assert scaler.get_scale() == 2.0**-126


@pytest.mark.parametrize("copy_of", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_are_lazy_and_equal(copy_of):
    scaler, optimizer = make(optim.AdamW, hysteresis=3, max_scale=64.0)
    iterate(scaler, optimizer)
    iterate(scaler, optimizer, math.inf)
    other = copy_of(scaler)
    assert other._scale is None
    assert other.state_dict() == scaler.state_dict()
    assert other.state_dict()["_hysteresis_tracker"] == 2
    for s in (scaler, other):
        iterate(s, optimizer, math.inf)
        iterate(s, optimizer, math.inf)
    assert other.state_dict() == scaler.state_dict()
    assert other.get_scale() == 4.0


def test_a_pickle_of_torchs_scaler_becomes_ours_under_patch_torch():
    saved = pickle.dumps(torch.amp.GradScaler(DEVICE, init_scale=8.0))
    with fusedamp.patch_torch():
        scaler = pickle.loads(saved)
    assert type(scaler) is GradScaler
    _, optimizer = make(optim.AdamW)
    iterate(scaler, optimizer, math.inf)
    assert scaler.get_scale() == 4.0
