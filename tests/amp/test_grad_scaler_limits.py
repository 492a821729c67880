"""Floor, ceiling and hysteresis of the scale, and messages at the floor."""

import math
import warnings

import pytest
import torch
from fusedamp import GradScaler, optim
from fusedamp.amp.floor import FloorWatch
from on_device import DEVICE

UPDATES = 1 if DEVICE == "cpu" else 3  # until a reading is known; later updates use it


def make(cls=optim.AdamW, **options):
    param = torch.ones(3, requires_grad=True)
    scaler = GradScaler(DEVICE, **{"init_scale": 8.0, **options})
    return param, scaler, cls([("encoder.weight", param)], lr=0.1)


def iterate(param, scaler, optimizer, value=1.0):
    scaler.scale(torch.ones(()))
    param.grad = torch.full((3,), value) * scaler._scale
    scaler.step(optimizer)
    scaler.update()


def scales(param, scaler, optimizer, outcomes, value=1.0):
    """The scale after each iteration; "x" is an overflow, "." a good step."""
    seen = []
    for outcome in outcomes:
        iterate(param, scaler, optimizer, math.nan if outcome == "x" else value)
        seen.append(scaler.get_scale())
    return seen


@pytest.mark.parametrize("cls", [optim.AdamW, optim.SGD, torch.optim.SGD])
def test_200_bad_steps_and_then_a_good_one(cls):
    """torch's scale is 0 after 166 of them, and its next good step writes NaN into the weights."""
    param, scaler, optimizer = make(cls, init_scale=2.0**16)
    with pytest.warns(UserWarning, match="scale at its floor"):
        seen = scales(param, scaler, optimizer, "x" * 200)
    assert seen[:142] == [2.0 ** (15 - i) for i in range(142)]
    assert seen[142:] == [2.0**-126] * 58
    assert torch.equal(param, torch.ones(3))
    iterate(param, scaler, optimizer, 1.0)
    assert not scaler.last_step_skipped
    assert param.isfinite().all()
    assert (param < 1).all(), "the good step moved the weights"


def test_floor_warns_once_with_the_name_of_the_parameter():
    param, scaler, optimizer = make(min_scale=2.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scales(param, scaler, optimizer, "xx.")  # at the floor, but no overflow there
    with pytest.warns(UserWarning, match=r"(?s)min_scale 2.0.*encoder.weight \[3\]: 3 NaN") as caught:
        scales(param, scaler, optimizer, "xxx")
    assert len(caught) == 1
    assert caught[0].filename == __file__, "it points at the caller of update()"


def test_floor_raises_where_asked_and_the_scaler_goes_on():
    param, scaler, optimizer = make(min_scale=4.0, on_floor="raise")
    scales(param, scaler, optimizer, "x")
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"(?s)min_scale 4.0.*encoder.weight"):
            scales(param, scaler, optimizer, "x" * UPDATES)
    iterate(param, scaler, optimizer)
    assert scaler.get_scale() == 4.0
    assert not scaler.last_step_skipped


@pytest.mark.parametrize("way", ["update", "load_state_dict"])
def test_floor_is_noticed_after_a_scale_set_by_hand(way):
    """The scaler skips readings that cannot find anything; a jump to the floor must end that."""
    param, scaler, optimizer = make(min_scale=1.0, init_scale=2.0**30, on_floor="raise")
    scales(param, scaler, optimizer, "..")
    if way == "update":
        scaler.update(1.0)
    else:
        scaler.load_state_dict({**scaler.state_dict(), "scale": 1.0})
    with pytest.raises(RuntimeError, match="floor"):
        scales(param, scaler, optimizer, "x" * UPDATES)


def test_looks_at_the_scale_are_rare():
    """Each reading copies from the device (on CUDA, asynchronously): one in 16 updates from 2**16 to a floor
    of 1.
    """
    param, scaler, optimizer = make(min_scale=1.0, init_scale=2.0**16)
    looks, judge = [], scaler._floor._judge
    scaler._floor._judge = lambda *args: looks.append(1) or judge(*args)
    scales(param, scaler, optimizer, "." * 64)
    assert len(looks) == 4


def test_a_look_that_is_still_on_its_way():
    """On CUDA the answer comes some updates later; nothing waits, and what it says is reckoned on."""

    class Event:
        done = False

        def query(self):
            return self.done

    watch, event, scale, good = FloorWatch(), Event(), torch.tensor(4.0), torch.zeros(())
    watch._pending = (event, torch.tensor([4.0, 1.0]), 0.5)
    assert not watch.stuck(scale, good, 4.0, 0.5)
    event.done = True
    assert watch.stuck(scale, good, 4.0, 0.5)
    assert watch._pending is None
    assert watch._at_least == 4.0 * 0.5**3, "three updates may have lowered it since"


def test_ceiling():
    param, scaler, optimizer = make(max_scale=20.0, growth_interval=1)
    assert scales(param, scaler, optimizer, "...x.") == [16.0, 20.0, 20.0, 10.0, 20.0]


@pytest.mark.parametrize(
    ("refill", "outcomes", "expected"),
    [
        # The second overflow since the last refill, and each after it, lowers the scale; growth refills.
        ("growth", "x x x . x . . x x", [8, 4, 2, 2, 1, 1, 2, 2, 1]),
        ("growth", "x . x . . x", [8, 8, 4, 4, 8, 8]),
        # Any good step refills.
        ("good_step", "x x x . x . x x", [8, 4, 2, 2, 2, 2, 2, 1]),
        ("good_step", "x . x . x x", [8, 8, 8, 8, 8, 4]),
    ],
)
def test_hysteresis_in_both_senses(refill, outcomes, expected):
    param, scaler, optimizer = make(hysteresis=2, hysteresis_refill=refill, growth_interval=2)
    assert scales(param, scaler, optimizer, outcomes.replace(" ", "")) == expected


def test_hysteresis_is_saved_and_its_absence_means_a_full_budget():
    param, scaler, optimizer = make(hysteresis=3)
    scales(param, scaler, optimizer, "xx")
    state = scaler.state_dict()
    assert state["_hysteresis_tracker"] == 1
    torch.amp.GradScaler(DEVICE).load_state_dict(state)
    _, resumed, _ = make(hysteresis=3)
    resumed.load_state_dict(state)
    assert scales(param, resumed, optimizer, "x") == [4.0]
    del state["_hysteresis_tracker"]
    resumed.load_state_dict(state)
    assert scales(param, resumed, optimizer, "xxx") == [8.0, 8.0, 4.0]
    assert "_hysteresis_tracker" not in make()[1].state_dict()


def test_broken_scales_never_reach_the_weights():
    """A scale of 0, inf or NaN set by hand: torch writes NaN or nothing into the weights."""
    for broken in (0.0, 1e-39, math.inf, math.nan):
        param, scaler, optimizer = make()
        iterate(param, scaler, optimizer)
        before = param.detach().clone()
        scaler._scale.fill_(broken)
        param.grad = torch.ones(3)
        scaler.step(optimizer)
        assert torch.equal(param, before) or broken == math.inf
        assert param.isfinite().all()
