"""Every number that a scaler is given fits the type that will hold it, or is refused before anything changes;
what `scale` takes.
"""

import math
from collections import OrderedDict, UserDict, defaultdict, namedtuple
from types import MappingProxyType

import fusedamp
import pytest
import torch
from fusedamp import GradScaler, optim
from fusedamp.amp import limits
from on_device import DEVICE

MAX = torch.finfo(torch.float32).max
HUGE = 10**400  # beyond a float
NO_NUMBERS = [True, "8", None, 1j, torch.tensor(True), torch.ones(2), torch.tensor(1j), [8.0]]
SCALES = [0, -1.0, math.nan, math.inf, 1e39, HUGE]
COUNTS = [0, -1, 1.5, math.nan, math.inf, 2**31, 1e39, HUGE]
WRONG = {
    "init_scale": SCALES,
    "growth_factor": [0.5, math.nan, math.inf, HUGE],
    "backoff_factor": [0, 1.5, math.nan, -math.inf],
    "growth_interval": COUNTS,
    "min_scale": [0.0, 2.0**-127, 1e39, math.inf, math.nan],
    "max_scale": [1e39, math.nan, 2.0**-127, -HUGE],
    "hysteresis": COUNTS,
}


def make(**options):
    param = torch.ones(3, requires_grad=True)
    scaler = GradScaler(DEVICE, **{"init_scale": 8.0, "hysteresis": 4, **options})
    return param, scaler, optim.SGD([param], lr=0.1)


def iterate(param, scaler, optimizer, value=1.0):
    param.grad = torch.full((3,), value) * scaler.scale(torch.ones(()))
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("name", WRONG)
def test_constructor(name):
    for value in WRONG[name]:
        with pytest.raises((ValueError, AssertionError), match=rf"{name} is|factor must be"):
            GradScaler(DEVICE, **{name: value})
    for value in NO_NUMBERS:
        with pytest.raises(
            (TypeError, AssertionError), match=rf"{name} is .*; expected a number|'[<>]' not|factor"
        ):
            GradScaler(DEVICE, **{name: value})


def test_one_element_tensors_and_the_last_numbers_that_fit():
    one = torch.tensor([2.0])
    scaler = GradScaler(
        DEVICE,
        init_scale=torch.tensor(MAX),
        growth_factor=one,
        backoff_factor=torch.tensor(0.5, dtype=torch.float64),
        growth_interval=torch.tensor(2**31 - 1),
        min_scale=one,
        max_scale=MAX,
        hysteresis=2**31 - 1,
    )
    assert scaler.scale(torch.ones(())) == MAX
    scaler.update(torch.tensor([4]))
    assert scaler.state_dict() == {
        "scale": 4.0,
        "growth_factor": 2.0,
        "backoff_factor": 0.5,
        "growth_interval": 2**31 - 1,
        "_growth_tracker": 0,
        "_hysteresis_tracker": 2**31 - 1,
    }
    assert {type(value) for value in scaler.state_dict().values()} == {int, float}
    assert GradScaler(DEVICE, max_scale=math.inf)._max_scale == math.inf
    param, optimizer = torch.ones(3, requires_grad=True), None
    optimizer = optim.SGD([param], lr=0.1)
    iterate(param, scaler, optimizer)
    iterate(param, scaler, optimizer, math.inf)
    assert scaler.state_dict()["_hysteresis_tracker"] == 2**31 - 2


def test_setters_change_nothing_where_they_refuse():
    _, scaler, _ = make()
    before = scaler.state_dict()
    for name in ("growth_factor", "backoff_factor", "growth_interval"):
        setter = getattr(scaler, f"set_{name}")
        for value in WRONG[name]:
            with pytest.raises(ValueError, match=rf"\[GradScaler\] {name} is .*; expected"):
                setter(value)
        for value in NO_NUMBERS:
            with pytest.raises(TypeError, match=rf"{name} is"):
                setter(value)
    assert scaler.state_dict() == before


# update(new_scale) ---------------------------------------------------------------------------------


@pytest.mark.parametrize("value", SCALES)
def test_update_refuses_what_is_no_scale(value):
    param, scaler, optimizer = make()
    iterate(param, scaler, optimizer)
    with pytest.raises(
        ValueError, match=r"\[GradScaler\] new_scale is .*; expected a finite number > 0 and at most 3"
    ):
        scaler.update(value)
    assert scaler.get_scale() == 8.0


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.0, -1.0, 1e39])
def test_update_with_a_tensor_that_is_no_scale(value):
    """A CPU tensor raises immediately; the host does not read others, and the scale is unchanged."""
    param, scaler, optimizer = make()
    iterate(param, scaler, optimizer)
    new = torch.tensor(value, dtype=torch.float64)
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match="new_scale is"):
            scaler.update(new)
        assert scaler.get_scale() == 8.0
    scaler._set_scale(new)  # as for a tensor on a device
    assert scaler.get_scale() == 8.0
    scaler.update(new.new_full((1,), 16.0))
    assert scaler.get_scale() == 16.0


@pytest.mark.host
@pytest.mark.parametrize("value", [torch.tensor(True), torch.tensor(1j)])
def test_update_with_a_tensor_of_no_numbers(value):
    _, scaler, _ = make()
    scaler.scale(torch.ones(()))
    with pytest.raises(TypeError, match="new_scale is"):
        scaler.update(value)
    assert scaler.get_scale() == 8.0


# load_state_dict -----------------------------------------------------------------------------------

BAD_STATES = {
    "scale": [math.nan, math.inf, -1.0, 1e39, "8", True, torch.ones(2)],
    "growth_factor": [0.5, math.inf, None],
    "backoff_factor": [0.0, 2.0, "x"],
    "growth_interval": [0, 1.5, 2**31, "2"],
    "_growth_tracker": [-1, 0.5, 2**31 - 1, 2**40, math.nan, "1", None, True],
    "_hysteresis_tracker": [-1, 0.5, 2**31, math.inf, "1", True],
}


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("name", BAD_STATES)
def test_a_bad_entry_changes_nothing(name, started):
    """All other entries are good, and new."""
    param, scaler, optimizer = make()
    if started:
        iterate(param, scaler, optimizer, math.inf)
    before = scaler.state_dict()
    good = {
        "scale": 2.0,
        "growth_factor": 3.0,
        "backoff_factor": 0.25,
        "growth_interval": 7,
        "_growth_tracker": 5,
        "_hysteresis_tracker": 2,
    }
    assert all(before[key] != value for key, value in good.items())
    for value in BAD_STATES[name]:
        with pytest.raises((ValueError, TypeError), match=name):
            scaler.load_state_dict({**good, name: value})
        assert scaler.state_dict() == before
    scaler.load_state_dict(good)
    assert scaler.state_dict() == good


def test_a_state_of_tensors_and_a_spent_budget():
    _, scaler, _ = make()
    state = {name: torch.tensor(value) for name, value in scaler.state_dict().items()}
    scaler.load_state_dict({**state, "_hysteresis_tracker": torch.tensor(0)})
    assert scaler.state_dict()["_hysteresis_tracker"] == 0
    scaler.load_state_dict({**state, "scale": 0, "_hysteresis_tracker": None})
    assert scaler.state_dict()["scale"] == limits.MIN_SCALE
    assert scaler.state_dict()["_hysteresis_tracker"] == 4


# Clipping ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["scaler", "function"])
def test_clipping_refuses_what_is_no_number(way):
    param, scaler, optimizer = make()
    scaler.scale(torch.ones(()))
    param.grad = torch.ones(3)

    def clip(*args):
        return (
            scaler.clip_grad_norm_(optimizer, *args)
            if way == "scaler"
            else fusedamp.clip_grad_norm_([param], *args)
        )

    for value in (True, "1", None, 1j, [1.0], torch.tensor(True), torch.tensor(1j), torch.ones(2)):
        with pytest.raises(TypeError, match="max_norm is"):
            clip(value)
    for value in (math.nan, -1.0, -HUGE):
        with pytest.raises(ValueError, match="max_norm is"):
            clip(value)
        with pytest.raises(ValueError, match="norm_type is"):
            clip(1.0, value)
    for value in (True, None, 1j, torch.ones(2)):
        with pytest.raises(TypeError, match="norm_type is"):
            clip(1.0, value)
    assert torch.equal(param.grad, torch.ones(3))
    assert clip(HUGE, "inf") == (1 / 8 if way == "scaler" else 1)


# What scale takes ----------------------------------------------------------------------------------


class Output(OrderedDict):
    """As the outputs of transformers' models: items are attributes, too."""

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def update(self, values):
        for key, value in values.items():
            self[key] = value


class Picky(dict):
    def __init__(self, one, two):
        super().__init__(one=one, two=two)

    def __copy__(self):
        raise TypeError("no copies")


def test_scale_takes_mappings():
    _, scaler, _ = make()
    one, pair = torch.ones(()), namedtuple("pair", "a b")
    plain = {"loss": one, "parts": {"a": [one, (one,)], "b": pair(one, one)}}
    assert scaler.scale(plain) == {"loss": 8, "parts": {"a": [8, (8,)], "b": pair(8, 8)}}
    assert plain["loss"] == 1
    assert scaler.scale([{"a": one}]) == [{"a": 8}]
    assert scaler.scale({}) == {}
    for kind in (OrderedDict, UserDict, MappingProxyType):
        given = kind({"b": one, "a": one})
        scaled = scaler.scale(given)
        assert type(scaled) is kind
        assert dict(scaled) == {"b": 8, "a": 8}
        assert dict(given) == {"b": 1, "a": 1}
    counted = defaultdict(list, a=one)
    scaled = scaler.scale(counted)
    assert (scaled["a"], scaled["new"], counted["a"]) == (8, [], 1)
    output = Output(loss=one)
    scaled = scaler.scale(output)
    assert type(scaled) is Output
    assert (scaled["loss"], scaled.loss, output["loss"], output.loss) == (8, 8, 1, 1)
    scaled = scaler.scale(Picky(one, one))
    assert type(scaled) is dict
    assert scaled == {"one": 8, "two": 8}


def test_scale_refuses_what_is_no_tensor_in_a_mapping():
    _, scaler, _ = make()
    for bad in ({"loss": 3.0}, {"loss": None}, {"a": {"b": "text"}}):
        with pytest.raises(ValueError, match="outputs must be a Tensor or an iterable of Tensors"):
            scaler.scale(bad)
    assert GradScaler(DEVICE, enabled=False).scale(bad) is bad


def test_an_interval_below_the_running_count_still_grows():
    """torch compares with ==, and never grows again."""
    scaler = GradScaler(DEVICE, init_scale=4.0, growth_interval=100)
    param = torch.ones(1, requires_grad=True)
    optimizer = torch.optim.SGD([param], lr=0.0)
    for step in range(6):
        if step == 5:
            scaler.set_growth_interval(2)
        scaler.scale(param.sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        assert scaler.get_scale() == (8.0 if step == 5 else 4.0)
