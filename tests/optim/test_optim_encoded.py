"""Editing states: edits that work for torch's optimizers work here or raise, in every format.

Guards that quantized values, block scales and remainders of split masters are never treated as numbers, in
live state and in checkpoints.
"""

import copy
import pickle

import pytest
import torch
from cases import kept, make_params, set_grads
from fusedamp import optim
from fusedamp.optim.state.encoded import Quantized
from on_device import DEVICE

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
INT8 = {"state_dtype": "int8", "rounding_seed": 5}


def momentum_sgd(weight, grad, dtype=torch.float32, **options):
    """SGD after one step of gradient ``grad``: its momentum is that gradient."""
    param = torch.nn.Parameter(torch.full((len(weight),), 0.0).copy_(torch.as_tensor(weight)).to(dtype))
    optimizer = optim.SGD([param], lr=1.0, momentum=0.9, **{**INT8, **options})
    param.grad = torch.as_tensor(grad).to(dtype)
    optimizer.step()
    return param, optimizer


def with_param(optimizer, old, new):
    """``new`` in the place of ``old``, as one grows or prunes a layer; returns its state."""
    optimizer.param_groups[0]["params"] = [new]
    entry = optimizer.state[new] = optimizer.state.pop(old)
    return entry


def near(found, wanted):
    """Within a step of the 16 values that an 8-bit state has per octave."""
    torch.testing.assert_close(found.float(), wanted.float(), rtol=1 / 16, atol=0)


def test_a_grown_weight_takes_its_appended_momentum():
    """SGD, momentum 0.9, gradient 1e-3: the next step is 0.9e-3 (of quantized values it would be 100.8)."""
    old, optimizer = momentum_sgd(torch.zeros(5), torch.full((5,), 1e-3))
    new = torch.nn.Parameter(torch.zeros(8))
    entry = with_param(optimizer, old, new)
    entry["momentum_buffer"] = torch.cat((entry["momentum_buffer"], torch.zeros(3)))
    new.grad = torch.zeros(8)
    optimizer.step()
    near(new[:5], torch.full((5,), -0.9e-3))
    assert (new[5:] == 0).all()


EDITS = {
    "masked": lambda v, keep: v * keep,
    "filled": lambda v, keep: v.masked_fill(~keep, 0.0),
    "where": lambda v, keep: torch.where(keep, v, 0.0),
    "scaled": lambda v, keep: v * 0.5,
    "float": lambda v, keep: v.float(),
    "half": lambda v, keep: v.to(torch.float16).float(),
    "averaged": lambda v, keep: torch.stack([v, torch.zeros_like(v)]).mean(0),
    "blended": lambda v, keep: torch.lerp(v, torch.ones(v.shape), 0.25),
    "added in place elsewhere": lambda v, keep: torch.zeros(v.shape).add_(v.float()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_arithmetic_is_that_of_the_values(edit):
    """The same edit of an FP32 momentum, and the next steps within what 8 bits round."""
    grads = torch.linspace(-1, 1, 300)
    keep = torch.arange(300) % 3 > 0
    ends = []
    for options in ({}, {"state_dtype": "float32"}):
        param, optimizer = momentum_sgd(torch.zeros(300), grads, torch.float32, **options)
        entry = optimizer.state[param]
        entry["momentum_buffer"] = edit(entry["momentum_buffer"], keep)
        before = param.detach().clone()
        param.grad = torch.zeros(300)
        optimizer.step()
        ends.append(before - param.detach())
        assert isinstance(entry["momentum_buffer"], Quantized) == (not options)
    coarse = (
        1 / 32 if edit is EDITS["blended"] else 2.0**-12
    )  # half a step of 8 bits at 1, where a sum is near 0
    torch.testing.assert_close(*ends, rtol=1 / 8, atol=coarse)


def test_pruned_states_follow_their_weight():
    old, optimizer = momentum_sgd(torch.zeros(400), torch.linspace(0.1, 1, 400))
    keep = torch.arange(400) % 2 == 0
    new = torch.nn.Parameter(old.detach()[keep])
    entry = with_param(optimizer, old, new)
    entry["momentum_buffer"] = entry["momentum_buffer"][keep]
    before, new.grad = new.detach().clone(), torch.zeros(200)
    optimizer.step()
    near(before - new, 0.9 * torch.linspace(0.1, 1, 400)[keep])


def adamw(dtype=torch.bfloat16, **options):
    params = make_params(dtype)
    optimizer = optim.AdamW(params, lr=1e-2, **{"master_weights": "split", **INT8, **options})
    for step in range(3):
        set_grads(params, step)
        optimizer.step()
    return params, optimizer


IN_PLACE = {
    "mul_": lambda t: t.mul_(2),
    "add_": lambda t: t.add_(1),
    "copy_ of numbers": lambda t: t.copy_(torch.zeros(t.shape)),
    "a slice": lambda t: t[:1],
    "a view": lambda t: t.view(-1),
    "setitem": lambda t: t.__setitem__(0, 0),
    "foreach": lambda t: torch._foreach_mul_([t], 2.0),
    "out=": lambda t: torch.add(torch.ones(t.shape), 1.0, out=t),
    ".data": lambda t: setattr(t, "data", torch.zeros(t.shape)),
    "storage": lambda t: t.untyped_storage(),
    "dlpack": lambda t: torch.from_dlpack(t),
    "resize_": lambda t: t.resize_(2),
}


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_scale", "master"])
@pytest.mark.parametrize("edit", IN_PLACE.values(), ids=IN_PLACE)
def test_edits_in_place_are_refused_and_change_nothing(edit, key):
    params, optimizer = adamw()
    before = {name: value.clone() for name, value in kept(optimizer.state[params[1]]).items()}
    with pytest.raises(TypeError, match=r"\[fusedamp.optim\] .* which is encoded"):
        edit(optimizer.state[params[1]][key])
    for name, value in kept(optimizer.state[params[1]]).items():
        assert torch.equal(value, before[name]), name


NUMBERS = {
    "double": torch.Tensor.double,
    "half": torch.Tensor.half,
    "cat": lambda t: torch.cat((t, t)),
    "index": lambda t: t[torch.zeros(1, dtype=torch.long)],
    "mean": lambda t: torch.stack((t, t)).float().mean(0),
}


@pytest.mark.parametrize("key", ["exp_avg_scale", "master"])
@pytest.mark.parametrize("read", NUMBERS.values(), ids=NUMBERS)
def test_scales_and_remainders_are_no_numbers(read, key):
    params, optimizer = adamw()
    with pytest.raises(TypeError, match="which is encoded"):
        read(optimizer.state[params[1]][key])


@pytest.mark.parametrize("key", ["exp_avg", "exp_avg_scale", "master"])
def test_collectives_are_refused(key, tmp_path):
    """Guards averaging over workers: sums of quantized values mean nothing."""
    dist = torch.distributed
    params, optimizer = adamw()
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(TypeError, match="which is encoded"):
            dist.all_reduce(optimizer.state[params[1]][key])
    finally:
        dist.destroy_process_group()


COPIES = {
    "clone": lambda t: t.clone(),
    "detach": lambda t: t.detach(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda t: pickle.loads(pickle.dumps(t)),
    "to": lambda t: t.to(DEVICE, copy=True),
    "cpu": lambda t: t.cpu(),
    "data": lambda t: t.data,
}


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_whole_copies_put_in_place_go_on(copied):
    """Moving states to another device and back, or restoring a copy, changes no bit of the steps."""
    ends = []
    for change in (False, True):
        params, optimizer = adamw()
        for entry in optimizer.state.values() if change else ():
            for name, value in entry.items():
                entry[name] = copied(value) if isinstance(value, torch.Tensor) else value
        set_grads(params, 3)
        optimizer.step()
        ends.append([*params, *(t for p in params for t in kept(optimizer.state[p]).values())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_another_order_in_memory_is_refused():
    """Block scales belong to neighbors in memory: of a channels-last weight, too."""
    param = torch.nn.Parameter(torch.randn(3, 40, 5, 6).to(memory_format=torch.channels_last))
    optimizer = optim.AdamW([param], **INT8)
    param.grad = torch.randn_like(param)
    optimizer.step()
    state = optimizer.state[param]["exp_avg"]
    assert torch.equal(state.clone(), state)
    with pytest.raises(TypeError, match="a change of the memory order"):
        state.contiguous()
    assert state.float().contiguous().is_contiguous()


def exchanged(entries):
    one, other = entries
    one["momentum_buffer"], other["momentum_buffer"] = other["momentum_buffer"], one["momentum_buffer"]


LATE = {
    "exchanged": (exchanged, (1e-3, 1.0)),
    "halved": (lambda e: e[0].update(momentum_buffer=e[0]["momentum_buffer"] * 0.5), (0.5, 1e-3)),
    ".data": (
        lambda e: setattr(e[0]["momentum_buffer"], "data", e[1]["momentum_buffer"].clone()),
        (1e-3, 1e-3),
    ),
    "copy_": (lambda e: e[0]["momentum_buffer"].copy_(e[1]["momentum_buffer"]), (1e-3, 1e-3)),
    "swapped": (
        lambda e: torch.utils.swap_tensors(e[0]["momentum_buffer"], e[1]["momentum_buffer"]),
        (1e-3, 1.0),
    ),
}


@pytest.mark.parametrize(("edit", "wanted"), LATE.values(), ids=LATE)
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_edits_are_seen_by_checkpoints_and_by_the_next_step(edit, wanted, steps):
    """States that a program replaced, before any step has read them."""
    params = [torch.nn.Parameter(torch.zeros(256)) for _ in range(2)]
    optimizer = optim.SGD(params, lr=1.0, momentum=0.5, dampening=0.5, **INT8)
    for _ in range(steps):
        for param, grad in zip(params, (1.0, 1e-3), strict=True):
            param.grad = torch.full((256,), grad)
        optimizer.step()
    entries = [optimizer.state[p] for p in params]
    for entry, value in zip(entries, (1.0, 1e-3), strict=True):
        entry["momentum_buffer"] = torch.full((256,), value)
    for param in params:
        param.grad = torch.zeros(256)
    optimizer.param_groups[0].update(momentum=1.0, dampening=1.0)
    optimizer.step()  # which quantizes them; without gradient they stay
    edit(entries)
    loaded = optim.SGD(params, momentum=0.9)
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    before = [p.detach().clone() for p in params]
    optimizer.step()
    for param, old, value in zip(params, before, wanted, strict=True):
        near(loaded.state[param]["momentum_buffer"], torch.full((256,), value))
        near(old - param.detach(), torch.full((256,), value))


@pytest.mark.parametrize("how", ["zero_", ".data", "swap_tensors"])
def test_a_kept_state_is_changed_between_two_steps(how):
    """Nothing accesses the state in between, so the step reuses the previous step's plan."""
    ends = []
    for assigned in (True, False):
        param = torch.nn.Parameter(torch.ones(256))
        optimizer = optim.AdamW([param], lr=0.1, **INT8)
        param.grad = torch.ones(256)
        optimizer.step()
        entry = optimizer.state[param]
        state = entry["exp_avg"]
        zero = state.clone().zero_()
        param.grad = torch.ones(256)
        optimizer.step()
        assert optimizer._slots
        if assigned:
            entry["exp_avg"] = zero
        elif how == "zero_":
            state.zero_()
        elif how == ".data":
            state.data = zero
        else:
            torch.utils.swap_tensors(state, zero)
        param.grad = torch.zeros(256)
        optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_states_of_other_kinds_are_not_copied_into_each_other():
    params, optimizer = adamw()
    entry = optimizer.state[params[5]]
    for one, other in (("exp_avg", "exp_avg_sq"), ("exp_avg_sq", "exp_avg")):
        with pytest.raises(TypeError, match="which is encoded"):
            entry[one].copy_(entry[other])


def test_states_can_be_set_to_zero_and_copied_back():
    params, optimizer = adamw()
    entry = optimizer.state[params[1]]
    saved = {name: entry[name].clone() for name in ("exp_avg", "exp_avg_sq", "master")}
    for name in saved:
        assert entry[name].zero_() is entry[name]
    assert (entry["exp_avg"].float() == 0).all()
    assert (entry["exp_avg_sq"].float() == 0).all()
    for name, value in saved.items():
        entry[name].copy_(value)
        assert torch.equal(entry[name], value)


def test_live_values_of_other_kinds_are_refused():
    """Bare quantized values, of another optimizer or a checkpoint, in a live state."""
    params, optimizer = adamw()
    saved = optimizer.state_dict()["state"][1]
    for value, text in (
        (saved["exp_avg"], "of dtype torch.int8; expected floating-point values"),
        (torch.zeros(3), r"has state 'exp_avg' of shape \[3\]"),
        (5.0, "has state 'exp_avg' of type float"),
    ):
        optimizer.state[params[1]]["exp_avg"] = value
        set_grads(params, 3)
        before = [p.detach().clone() for p in params]
        with pytest.raises((ValueError, TypeError), match=r"\[AdamW\] group 0: params\[1\] .*" + text):
            optimizer.step()
        assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_it_says_what_it_is():
    params, optimizer = adamw()
    assert repr(optimizer.state[params[1]]["exp_avg"]).startswith("Quantized(shape=[7], bits=torch.int8")
    assert torch.equal(
        optimizer.state[params[1]]["exp_avg"].dequantize(), optimizer.state[params[1]]["exp_avg"].float()
    )
