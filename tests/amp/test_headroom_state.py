"""GradScaler(policy="headroom"): its state in checkpoints, pickles and copies, and its arguments."""

import copy
import io
import json
import pickle
import random

import pytest
import torch
from fusedamp import GradScaler, amp
from headroom_model import INF, follow, fused, give_gradients, headroom, maxima, params_of
from on_device import DEVICE


def step(scaler, optimizer):
    pass


def trained(steps=40, **options):
    params = params_of()
    return follow(headroom(**options), [fused(params)], params, step, steps)[0]


def trajectory(scaler, steps=700):
    params = params_of()
    optimizer, rng, scales = fused(params), random.Random(5), []
    scaler.scale(torch.ones(()))
    for unscaled in maxima(rng, steps):
        if give_gradients(rng, params, scaler.get_scale(), unscaled) >= 65520:
            params[0].grad[0] = INF
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales, scaler.state_dict()


def through_json(scaler):
    other = headroom()
    other.load_state_dict(json.loads(json.dumps(scaler.state_dict())))
    return other


def through_a_file(scaler):
    file, other = io.BytesIO(), headroom()
    torch.save(scaler.state_dict(), file)
    file.seek(0)
    other.scale(torch.ones(()))  # the state is on its device already
    other.load_state_dict(torch.load(file, weights_only=True))
    return other


RESUMED = {
    "JSON": through_json,
    "torch.save": through_a_file,
    "pickle": lambda scaler: pickle.loads(pickle.dumps(scaler)),
    "deepcopy": copy.deepcopy,
    "pickle of a pickle": lambda scaler: pickle.loads(pickle.dumps(pickle.loads(pickle.dumps(scaler)))),
}


@pytest.mark.parametrize("steps", [0, 40, 600])
@pytest.mark.parametrize("way", RESUMED)
def test_resumed_scalers_go_on_alike(way, steps):
    scaler = trained(steps) if steps else headroom()
    other = RESUMED[way](scaler)
    assert other.state_dict() == scaler.state_dict()
    assert trajectory(other) == trajectory(scaler)


def test_the_state_is_torchs_and_a_list():
    state = trained().state_dict()
    theirs = torch.amp.GradScaler(DEVICE).state_dict()
    assert list(state) == [*theirs, "_headroom"]
    assert all(type(number) is int for number in state["_headroom"])
    assert len(state["_headroom"]) <= 516
    assert "_headroom" not in GradScaler(DEVICE).state_dict()
    assert headroom(enabled=False).state_dict() == {}


def test_torchs_scaler_loads_it_and_the_other_way():
    ours, theirs = trained(), torch.amp.GradScaler(DEVICE, init_scale=1000.0, growth_factor=3.0)
    before = theirs.state_dict()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.state_dict() == {k: v for k, v in ours.state_dict().items() if k != "_headroom"}
    plain = GradScaler(DEVICE)
    plain.load_state_dict(ours.state_dict())
    assert plain.get_scale() == ours.get_scale()
    ours.load_state_dict(before)
    assert ours.state_dict() == before | {"_headroom": [0] * 4}
    params = params_of()
    give_gradients(random.Random(0), params, 1000.0, 0.1)
    ours.step(optimizer := fused(params))
    assert optimizer.state
    ours.update()
    assert ours.get_scale() == 512.0


@pytest.mark.parametrize(
    ("saved", "text"),
    [
        ([0] * 3, "is 3 numbers; expected a list of 4 to 516 whole numbers, or none"),
        ([0] * 517, "is 517 numbers; expected a list of 4 to 516"),
        (None, "is a NoneType; expected a list"),
        (torch.zeros(584), "is a Tensor; expected a list"),
        ([4, 0, 0, 64], "[0] is 4; expected a whole number from 0 to 3"),
        ([0, -1, 0, 64], "[1] is -1; expected a whole number from 0 to 2147483646"),
        ([0, 0, 2**31 - 1, 64], "[2] is 2147483647; expected a whole number from 0 to 2147483646"),
        ([0, 0, 0, 2**31], "[3] is 2147483648; expected a whole number from 0 to 2147483647"),
        ([0, 0, 0, 64, 1, 24], "[5] is 24; expected a whole number from -40 to 23"),
        ([0, 0, 0, 64, 1.0], "[4] is 1.0; expected a whole number from -40 to 23"),
        ([0, 0, 0, True], "[3] is True; expected a whole number"),
    ],
)
def test_states_that_are_none_are_refused(saved, text):
    scaler = trained()
    before = scaler.state_dict()
    with pytest.raises(ValueError, match=r"^\[GradScaler\] state_dict\['_headroom'\]") as caught:
        scaler.load_state_dict(before | {"_headroom": saved, "scale": 1.0})
    assert text in str(caught.value)
    assert scaler.state_dict() == before
    longest = [3, 2**31 - 2, 2**31 - 2, 2**31 - 1, *[23] * 512]
    scaler.load_state_dict(before | {"_headroom": longest})
    assert scaler.state_dict()["_headroom"] == longest


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (dict(policy="logmax"), "policy is 'logmax'; expected \"overflow\" or \"headroom\""),
        (dict(policy=None), "policy is None; expected"),
        (dict(headroom_bits=15), "headroom_bits is 15; expected a whole number from 0 to 14"),
        (dict(headroom_bits=-1), "headroom_bits is -1; expected a whole number from 0 to 14"),
        (dict(headroom_bits=1.5), "headroom_bits is 1.5; expected a whole number"),
        (dict(policy="overflow", headroom_bits=3), 'headroom_bits is 3; expected policy="headroom" with it'),
        (dict(hysteresis=2), 'hysteresis is 2; expected the default with policy="headroom"'),
        (dict(hysteresis_refill="good_step"), "hysteresis_refill is 'good_step'; expected the default"),
        (dict(growth_factor=3.0), 'growth_factor is 3.0; expected 2.0 with policy="headroom"'),
        (dict(backoff_factor=0.25), 'backoff_factor is 0.25; expected 0.5 with policy="headroom"'),
        (dict(min_scale=5.0, max_scale=7.0, init_scale=6.0), "max_scale is 7.0; expected a power of two"),
        (dict(min_scale=2.0**127 * 1.5, init_scale=2.0**127 * 1.5), "max_scale is inf; expected a power of"),
    ],
)  # fmt: skip
def test_arguments_that_do_not_fit_are_refused(options, text):
    with pytest.raises(ValueError, match=r"^\[GradScaler\] ") as caught:
        GradScaler(DEVICE, **{"policy": "headroom", **options})
    assert text in str(caught.value)


def test_kinds_of_arguments():
    with pytest.raises(TypeError, match=r"headroom_bits is 'two'; expected a number"):
        headroom(headroom_bits="two")
    with pytest.raises(TypeError):
        GradScaler(DEVICE, 1.0, 2.0, 0.5, 100, True, "headroom")  # keyword-only
    assert amp.cpu.GradScaler(policy="headroom", headroom_bits=1)._headroom.bits == 1


@pytest.mark.parametrize(("name", "default"), [("growth", 2.0), ("backoff", 0.5)])
def test_unused_factors_cannot_be_set(name, default):
    scaler, other = headroom(), 0.75 if name == "backoff" else 4.0
    setter = getattr(scaler, f"set_{name}_factor")
    setter(default)
    with pytest.raises(ValueError, match=rf"{name}_factor is {other}; expected {default} with policy"):
        setter(other)
    assert getattr(scaler, f"get_{name}_factor")() == default


def test_the_floor_is_noticed():
    params = params_of()
    optimizer, scaler = fused(params), headroom(init_scale=2.0**10, min_scale=2.0**3, on_floor="raise")
    scaler.scale(torch.ones(()))
    scales = []
    with pytest.raises(RuntimeError, match=r"scale at its floor \(min_scale 8.0\)"):  # noqa: PT012
        for _ in range(9):
            give_gradients(random.Random(0), params, INF, 1.0)
            scaler.step(optimizer)
            scaler.update()
            scales.append(scaler.get_scale())
    assert scales[:3] == [2.0**9, 2.0**7, 2.0**3]
    assert len(scales) <= (5 if DEVICE == "cpu" else 8)  # elsewhere a later update reads it


def test_a_scale_set_by_hand_is_rounded_down_at_the_next_update():
    params = params_of()
    optimizer, scaler = fused(params), headroom()
    scaler.scale(torch.ones(()))
    scaler.update(3000.0)
    assert scaler.get_scale() == 3000.0
    give_gradients(random.Random(0), params, 3000.0, 2.0**-6)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2048.0
    assert scaler._headroom.save()[4:] == [-6]
