"""Accesses of real programs to a scaler's private attributes."""

import pytest
import torch
from fusedamp import GradScaler, optim
from on_device import DEVICE, HERE
from torch.amp.grad_scaler import OptState

CLASSES = [optim.AdamW, torch.optim.AdamW, lambda p, lr: torch.optim.AdamW(p, lr=lr, fused=True)]
each_optimizer = pytest.mark.parametrize("make_optimizer", CLASSES, ids=["ours", "torch", "torch fused"])


def make(make_optimizer, scaler_class=GradScaler, grad=8.0):
    param = torch.ones(3, requires_grad=True)
    scaler = scaler_class(DEVICE, init_scale=8.0)
    scaler.scale(torch.ones(()))
    param.grad = torch.full((3,), grad)
    return param, scaler, make_optimizer([param], lr=0.1)


def moved(param):
    return not torch.equal(param, torch.ones(3))


@each_optimizer
@pytest.mark.parametrize("after", ["unscale_", "_check_inf_per_device"])
def test_found_inf_all_reduced_in_place(make_optimizer, after):
    """nanochat's idiom: another rank's overflow, merged into the live 0-d tensors, stops this rank's step."""
    param, scaler, optimizer = make(make_optimizer)
    getattr(scaler, after)(optimizer)
    flags = scaler._found_inf_per_device(optimizer)
    assert flags is scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"]
    assert [(flag.shape, flag.dtype) for flag in flags.values()] == [(torch.Size([]), torch.float32)]
    if after == "_check_inf_per_device" and make_optimizer is not CLASSES[0]:
        return  # torch's step checks again
    for flag in flags.values():
        flag.fill_(1.0)  # what all_reduce(MAX) does
    scaler.step(optimizer)
    assert not moved(param)
    scaler.update()
    assert scaler.get_scale() == 4.0


@each_optimizer
@pytest.mark.parametrize("value", [1.0, 2.0, torch.tensor([1.0]), torch.tensor(2)])
def test_found_inf_replaced(make_optimizer, value):
    """apex writes the dict; a sum of flags is 2, which torch's fused kernels take for "go on"."""
    param, scaler, optimizer = make(make_optimizer)
    scaler.unscale_(optimizer)
    state = scaler._per_optimizer_states[id(optimizer)]
    state["found_inf_per_device"] = {HERE: torch.as_tensor(value, device=HERE)}
    scaler.step(optimizer)
    assert not moved(param)
    assert scaler.last_step_skipped
    scaler.update()
    assert scaler.get_scale() == 4.0


@each_optimizer
@pytest.mark.parametrize("value", [float("nan"), 1.0])
def test_two_devices(make_optimizer, value):
    """If both overflow, torch adds the flags to 2 and steps with NaN, and its step count decreases by 1."""
    param, scaler, optimizer = make(make_optimizer)
    scaler.step(optimizer)
    scaler.update(8.0)
    weights, count = param.detach().clone(), optimizer.state[param]["step"].clone()
    param.grad = torch.full((3,), value)
    scaler.unscale_(optimizer)
    flags = scaler._found_inf_per_device(optimizer)
    flags[torch.device("cpu", 1)] = torch.ones(())  # as if parameters lived there too
    scaler.step(optimizer)
    assert torch.equal(param, weights)
    assert torch.equal(optimizer.state[param]["step"], count)
    live = [flag.clone() for flag in flags.values()]
    scaler.update()
    assert scaler.get_scale() == 4.0
    assert [flag.item() for flag in flags.values()] == live, (
        "update must not write into the flags, as torch's does"
    )


@each_optimizer
def test_stage_overwritten(make_optimizer):
    """SAM: two unscale_ in one iteration, with the stage set back by hand."""
    param, scaler, optimizer = make(make_optimizer)
    scaler.unscale_(optimizer)
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.UNSCALED
    scaler._per_optimizer_states[id(optimizer)]["stage"] = OptState.READY
    param.grad = torch.full((3,), 16.0)
    scaler.unscale_(optimizer)
    assert torch.equal(param.grad, torch.full((3,), 2.0))
    scaler.step(optimizer)
    assert moved(param)
    assert scaler._per_optimizer_states[id(optimizer)]["stage"] is OptState.STEPPED


@each_optimizer
def test_scale_replaced(make_optimizer):
    """The floor hack: nothing may hold on to the old tensor."""
    param, scaler, optimizer = make(make_optimizer)
    scaler._scale = torch.tensor(128.0).to(scaler._scale)
    assert scaler.get_scale() == 128.0
    assert scaler._get_scale_async() is scaler._scale
    assert scaler.scale(torch.ones(())) == 128.0
    param.grad = torch.full((3,), 128.0)
    scaler.unscale_(optimizer)
    assert torch.equal(param.grad, torch.ones(3))
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 128.0


def test_skip_is_seen_in_the_scale():
    """The commonest test for a skipped step."""
    for grad, skipped in ((8.0, False), (float("inf"), True)):
        _, scaler, optimizer = make(optim.AdamW, grad=grad)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < before) == skipped


def test_lazy_init_with_a_string_device():
    """Accelerate does it."""
    scaler = GradScaler(DEVICE, init_scale=8.0)
    scaler._lazy_init_scale_growth_tracker(scaler._device)
    assert (scaler._scale, scaler._growth_tracker) == (8.0, 0)
    assert (scaler._scale.dtype, scaler._growth_tracker.dtype) == (torch.float32, torch.int32)
    with pytest.raises(AssertionError, match="_growth_tracker initialized before _scale"):
        scaler._lazy_init_scale_growth_tracker(HERE)


def test_enabled_switched_off():
    param, scaler, optimizer = make(optim.AdamW)
    scaler._enabled = False
    assert scaler.get_scale() == 1.0
    scaler.step(optimizer)
    assert moved(param)


def test_isinstance_and_private_names():
    scaler = GradScaler(DEVICE)
    assert isinstance(scaler, torch.amp.GradScaler)
    assert isinstance(scaler, torch.GradScaler)
    for name in ("_scale", "_growth_tracker", "_init_scale", "_init_growth_tracker", "_per_optimizer_states"):
        assert hasattr(scaler, name)
    assert scaler._per_optimizer_states[1] == {"stage": OptState.READY, "found_inf_per_device": {}}


class Counting(GradScaler):
    """Overrides as ShardedGradScaler and fairscale have them; each must be called on every route."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.calls = []


def counting(name, veto=False):
    def method(self, optimizer, *args, **kwargs):
        self.calls.append(name)
        result = getattr(GradScaler, name)(self, optimizer, *args, **kwargs)
        if veto:  # as an all-reduce would bring it from another rank
            for flag in result.values():
                flag.fill_(1.0)
        return result

    return type("Counting", (Counting,), {name: method})


@each_optimizer
@pytest.mark.parametrize("veto", [False, True])
def test_overridden_unscale_grads(make_optimizer, veto):
    param, scaler, optimizer = make(make_optimizer, counting("_unscale_grads_", veto))
    scaler.step(optimizer)
    assert scaler.calls == ["_unscale_grads_"]
    assert moved(param) != veto


@pytest.mark.parametrize("veto", [False, True])
@pytest.mark.parametrize("make_optimizer", [CLASSES[0], CLASSES[2]])
def test_overridden_check_inf(make_optimizer, veto):
    param, scaler, optimizer = make(make_optimizer, counting("_check_inf_per_device", veto))
    scaler.step(optimizer)
    assert scaler.calls == ["_check_inf_per_device"]
    assert moved(param) != veto


@pytest.mark.parametrize("make_optimizer", CLASSES[:2])
def test_overridden_maybe_opt_step(make_optimizer):
    param, scaler, optimizer = make(make_optimizer, counting("_maybe_opt_step"))
    scaler.step(optimizer)
    assert scaler.calls == ["_maybe_opt_step"]
    assert moved(param)
