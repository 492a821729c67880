"""Offloaded as an optimizer: groups, state, checkpoints in both directions, copies, errors."""

import copy
import io
import pickle
import weakref
from contextlib import nullcontext

import fusedamp
import pytest
import torch
from cases import BY_NAME, make_params
from fusedamp import GradScaler, optim
from pretend_device import Pretended, loss_of, pair, step
from torch.optim.optimizer import register_optimizer_step_post_hook

HALF = torch.bfloat16
SPLIT = {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3}


def assert_equal(one, other):
    for p, q in zip(one, other, strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("form", [{}, SPLIT], ids=["fp32", "split-int8"])
@pytest.mark.parametrize("into", ["offloaded", "plain"])
def test_checkpoints_move_in_both_directions(into, form):
    params, plain, moved, offloaded = pair(lr=1e-2, **form)
    both = {"plain": (params, plain), "offloaded": (moved, offloaded)}
    source = both["plain" if into == "offloaded" else "offloaded"]
    for s in range(3):
        step(*source, s)
    file = io.BytesIO()
    torch.save(source[1].state_dict(), file)
    file.seek(0)
    target = both[into]
    guard = offloaded.link.edits() if into == "offloaded" else nullcontext()
    with guard, torch.no_grad():
        for p, q in zip(target[0], source[0], strict=True):
            p.copy_(q)
    target[1].load_state_dict(torch.load(file, weights_only=True))
    for s in range(3, 6):
        step(params, plain, s)
        step(moved, offloaded, s)
        assert_equal(params, moved)
    assert all(
        value.device.type == "cpu" for value in offloaded.state[moved[0]].values() if hasattr(value, "device")
    )


def test_loads_torchs_checkpoint():
    params, _, moved, offloaded = pair(dtype=torch.float32)
    theirs = torch.optim.AdamW(params)
    step(params, theirs, 0)
    offloaded.load_state_dict(theirs.state_dict())
    assert torch.equal(offloaded.state[moved[0]]["exp_avg"], theirs.state[params[0]]["exp_avg"])


def test_a_refused_checkpoint_changes_nothing():
    params, plain, moved, offloaded = pair()
    step(params, plain, 0)
    step(moved, offloaded, 0)
    bad = plain.state_dict()
    bad["state"][1]["exp_avg"] = torch.zeros(3)
    with pytest.raises(ValueError, match=r"state\[1\].*exp_avg"):
        offloaded.load_state_dict(bad)
    with pytest.raises(ValueError, match="'state' and 'param_groups'"):
        offloaded.load_state_dict({"a": 1})
    for s in (1, 2):
        step(params, plain, s)
        step(moved, offloaded, s)
    assert_equal(params, moved)


def test_hooks_of_checkpoints_run_once():
    _, _, moved, offloaded = pair()
    calls = []
    offloaded.register_state_dict_pre_hook(lambda o: calls.append("save"))
    offloaded.register_state_dict_post_hook(lambda o, sd: calls.append("saved"))
    offloaded.register_load_state_dict_pre_hook(lambda o, sd: calls.append("load"))
    offloaded.register_load_state_dict_post_hook(lambda o: calls.append("loaded"))
    step(moved, offloaded, 0)
    offloaded.load_state_dict(offloaded.state_dict())
    assert calls == ["save", "saved", "load", "loaded"]


def test_hooks_of_steps_run_once():
    _, _, moved, offloaded = pair()
    calls = []
    offloaded.register_step_post_hook(lambda *_: calls.append("own"))
    everywhere = register_optimizer_step_post_hook(lambda o, *_: calls.append(type(o)))
    step(moved, offloaded, 0)
    everywhere.remove()
    assert calls == ["own", Pretended]


def test_groups():
    """Options of the groups, changed between steps, and groups added later."""
    params, plain, moved, offloaded = pair([(8, 4), (5,), (3, 3)])
    extra = make_params(HALF, [(7,)], seed=5)
    more = copy.deepcopy(extra)
    for optimizer, some, added in ((plain, params, extra), (offloaded, moved, more)):
        step(some, optimizer, 0)
        optimizer.add_param_group({"params": added, "lr": 0.5, "name": "new"})
        optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.25)
        step([*some, *added], optimizer, 1)
        optimizer.param_groups[0].update(master_weights="none", stochastic_rounding=True)
        optimizer.param_groups[0]["rounding_seed"] = 4
        step([*some, *added], optimizer, 2)
        optimizer.param_groups[1]["params"], optimizer.param_groups[0]["params"] = (
            optimizer.param_groups[0]["params"],
            optimizer.param_groups[1]["params"],
        )
        step([*some, *added], optimizer, 3)
    assert_equal([*params, *extra], [*moved, *more])
    assert [{**g, "params": 0} for g in plain.param_groups] == [
        {**g, "params": 0} for g in offloaded.param_groups
    ]


def test_named_parameters():
    module = torch.nn.Linear(3, 2, dtype=HALF)
    offloaded = optim.Offloaded(optim.AdamW, module.named_parameters())
    module(torch.ones(1, 3, dtype=HALF)).sum().backward()
    offloaded.step()
    assert offloaded.state_dict()["param_groups"][0]["param_names"] == ["weight", "bias"]
    offloaded.load_state_dict(offloaded.state_dict())
    assert offloaded.param_groups[0]["param_names"] == ["weight", "bias"]


def test_default_seeds_are_those_without_offload(monkeypatch):
    from itertools import count

    from fusedamp.optim.core import optimizer

    options = {"state_dtype": HALF}
    params, moved = make_params(HALF), make_params(HALF)
    for kind in (optim.AdamW, lambda p, **o: optim.Offloaded(optim.AdamW, p, **o)):
        monkeypatch.setattr(optimizer, "seeds", count(7))
        made = kind(params if kind is optim.AdamW else moved, **options)
        assert made.param_groups[0]["rounding_seed"] == 7
        step(params if kind is optim.AdamW else moved, made, 0)
    assert_equal(params, moved)


def test_a_seed_that_an_option_needs_later_is_in_the_groups():
    params = make_params(HALF)
    offloaded = optim.Offloaded(optim.AdamW, params)
    assert offloaded.param_groups[0]["rounding_seed"] is None
    offloaded.param_groups[0]["state_dtype"] = "bfloat16"
    step(params, offloaded, 0)
    assert isinstance(offloaded.state_dict()["param_groups"][0]["rounding_seed"], int)


def test_parameters_that_leave_the_groups_are_freed():
    """Accelerate replaces the parameters of a group after construction."""
    params, plain, moved, offloaded = pair()
    replaced = [torch.nn.Parameter(p.detach().clone()) for p in params]
    step(params, plain, 0)
    gone = weakref.ref(moved[0])
    offloaded.param_groups[0]["params"] = replaced
    del moved
    step(replaced, offloaded, 0)
    assert_equal(params, replaced)
    assert gone() is None


@pytest.mark.parametrize("change", ["dtype", "layout"])
def test_parameters_that_change(change):
    params, plain, moved, offloaded = pair([(8, 4), (5,)], lr=1e-2)
    for some, optimizer in ((params, plain), (moved, offloaded)):
        step(some, optimizer, 0)
        some[0].data = some[0].data.to(torch.float32) if change == "dtype" else some[0].data.t().clone().t()
        step(some, optimizer, 1)
        step(some, optimizer, 2)
    assert_equal(params, moved)


def test_state_is_a_mapping_of_parameters():
    params, plain, moved, offloaded = pair()
    assert len(offloaded.state) == 0
    assert moved[0] not in offloaded.state
    step(params, plain, 0)
    step(moved, offloaded, 0)
    assert list(offloaded.state) == moved
    assert offloaded.state.get(params[0]) is None
    with pytest.raises(KeyError):
        offloaded.state[params[0]]
    for some, optimizer in ((params, plain), (moved, offloaded)):
        optimizer.state[some[0]]["exp_avg"] = optimizer.state[some[0]]["exp_avg"] * 2
        del optimizer.state[some[1]]
        optimizer.state[some[2]] = {}
        step(some, optimizer, 1)
        optimizer.state.clear()
        step(some, optimizer, 2)
    assert_equal(params, moved)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies(copied):
    """A copy with its parameters continues by itself, with the same bits."""
    params = make_params(HALF)
    offloaded = optim.Offloaded(optim.AdamW, params, lr=1e-2, **SPLIT)
    step(params, offloaded, 0)
    others, other = copied((params, offloaded))
    for s in (1, 2):
        step(others, other, s)
    assert not torch.equal(others[5], params[5])
    for s in (1, 2):
        step(params, offloaded, s)
    assert_equal(params, others)
    assert torch.equal(other.state[others[5]]["master"].bits, offloaded.state[params[5]]["master"].bits)


def test_closures():
    params, plain, moved, offloaded = pair()
    for some, optimizer in ((params, plain), (moved, offloaded)):

        def closure(some=some):
            loss = loss_of(some, 1)
            loss.backward()
            return loss

        assert optimizer.step(closure).requires_grad
    offloaded.link.settle()
    assert_equal(params, moved)


def test_the_scaler_takes_the_fused_step():
    """Gradients stay scaled and are not written; a flag and a scale set by hand count."""
    params, plain, moved, offloaded = pair()
    for some, optimizer in ((params, plain), (moved, offloaded)):
        scaler = GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(some, 0)).backward()
        before = some[0].grad.clone()
        optimizer.grad_scale = 2.0
        scaler.step(optimizer)
        assert torch.equal(some[0].grad, before)
        scaler.update()
        assert not hasattr(optimizer, "grad_scale")
        optimizer.found_inf = torch.tensor(1.0)
        scaler.step(optimizer)
        assert scaler.last_step_skipped
        scaler.update()
    offloaded.link.settle()
    assert_equal(params, moved)
    assert offloaded.state[moved[0]]["step"] == plain.state[params[0]]["step"] == 1


def test_overflow_report():
    _, _, moved, offloaded = pair()
    scaler = GradScaler("cpu", init_scale=8.0)
    scaler.scale(loss_of(moved, 0, poison=1)).backward()
    scaler.step(offloaded)
    (overflow,) = scaler.overflow_report(offloaded).overflows
    assert overflow.parameter == "Pretended group 0 parameter 1"


def test_step_pre_hooks_see_unscaled_gradients():
    params, plain, moved, offloaded = pair()
    for some, optimizer in ((params, plain), (moved, offloaded)):

        def halve(optimizer, args, kwargs, param=some[0]):
            param.grad.mul_(0.5)

        optimizer.register_step_pre_hook(halve)
        scaler = GradScaler("cpu", init_scale=8.0)
        scaler.scale(loss_of(some, 0)).backward()
        scaler.step(optimizer)
    offloaded.link.settle()
    assert_equal(params, moved)


def test_a_step_without_gradients():
    *_, offloaded = pair()
    scaler = GradScaler("cpu")
    scaler.scale(torch.ones(()))
    scaler.step(offloaded)
    scaler.update()
    offloaded.step()
    assert len(offloaded.state) == 0


def test_inference_mode():
    params, plain, moved, offloaded = pair()
    for some, optimizer in ((params, plain), (moved, offloaded)):
        loss_of(some, 0).backward()
        with torch.inference_mode():
            optimizer.step()
        optimizer.zero_grad()
        step(some, optimizer, 1)
    assert_equal(params, moved)


def test_fp32_weights_on_the_host():
    model = torch.nn.Linear(5, 3, dtype=HALF)
    other = copy.deepcopy(model)
    offloaded = optim.Offloaded(optim.AdamW, model.parameters(), master_weights="split")
    plain = optim.AdamW(other.parameters(), master_weights="split")
    step(list(model.parameters()), offloaded, 0)
    step(list(other.parameters()), plain, 0)
    found = fusedamp.checkpoints.fp32_state_dict(model, offloaded)
    expected = fusedamp.checkpoints.fp32_state_dict(other, plain)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_layerwise_rules_work_on_whole_tensors():
    case = BY_NAME["lamb"]
    params, plain, moved, offloaded = pair([(30, 5), (7,)], kind=case.ours, **case.options)
    for s in range(3):
        step(params, plain, s)
        step(moved, offloaded, s)
    assert_equal(params, moved)
