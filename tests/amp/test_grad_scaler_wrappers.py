"""Wrappers around optimizers, torch's and ours: they answer alike, and no step is lost or taken twice in
silence.
"""

import copy
import math
import types

import pytest
import torch
from fusedamp import optim
from wrappers import KINDS, SCALE, Own, started, weight

# The same wrapper around torch's class and ours ----------------------------------------------------


@pytest.mark.parametrize("kind", [optim.AdamW, torch.optim.AdamW])
def test_a_wrapper_answers_as_around_torchs_own_class(kind):
    param = weight(torch.float32)
    inner = kind([param], lr=0.1)
    made = Own(inner)
    made.step()
    assert made.state is inner.state
    assert made.state[param]["step"] == 1
    assert made.state_dict()["state"].keys() == inner.state_dict()["state"].keys() == {0}
    assert repr(made).startswith("W (")
    twin = copy.deepcopy(made)
    assert isinstance(twin, kind)
    assert twin.state_dict()["state"][0]["step"] == 1
    assert next(iter(twin.state)) is not param
    made.zero_grad()
    assert param.grad is None


def test_state_that_is_missing_is_an_attribute_error():
    bare = optim.SGD.__new__(optim.SGD)
    with pytest.raises(AttributeError, match="'SGD' object has no attribute 'state'"):
        bare.state  # noqa: B018
    assert not hasattr(bare, "state")


# Where a step was not what it seemed ---------------------------------------------------------------


def test_inputs_that_nobody_takes():
    """A step that passes for ours but steps nothing."""
    param, scaler = weight(torch.float32), started()
    optimizer = optim.SGD([param], lr=0.1)
    optimizer._step = lambda: None
    with pytest.raises(RuntimeError, match=r"SGD\.step\(\) did not run fusedamp's step .* still scaled"):
        scaler.step(optimizer)
    assert optimizer._amp is None
    assert param.item() == 1
    optim.SGD([param], lr=0.1).step()  # nothing waits any more
    assert param.item() == pytest.approx(1 - 0.2 * SCALE)


def test_another_object_steps_the_parameters_of_the_one_that_was_given():
    param, unrelated, scaler = weight(torch.float32), weight(torch.float32), started()
    optimizer, inner = optim.SGD([param], lr=0.1), optim.SGD([{"params": [unrelated]}, {"params": [param]}])
    optimizer._step = inner._step
    with pytest.raises(RuntimeError, match=r"\[SGD\.step\] scaler\.step was given another object"):
        scaler.step(optimizer)
    assert (param.item(), unrelated.item()) == (1, 1)
    inner.param_groups.pop()  # an optimizer of other parameters has nothing to do with it
    optimizer._step = lambda: inner._step() or optim.SGD._step(optimizer)
    scaler.step(optimizer)
    assert param.item() == pytest.approx(0.8)
    assert unrelated.item() != 1


def test_other_steps_are_free_once_the_inputs_are_taken():
    """A post-hook may drive what it wants; it finds the gradients scaled."""
    param, scaler = weight(torch.float32), started()
    optimizer, other = optim.SGD([param], lr=0.1), optim.SGD([param], lr=0.0)
    optimizer.register_step_post_hook(lambda *_: other.step())
    scaler.step(optimizer)
    assert param.item() == pytest.approx(0.8)


# torch's fused optimizers in wrappers --------------------------------------------------------------


def test_a_wrapper_that_forwards_the_mark_of_torchs_fused_optimizers():
    """Not a class of theirs at all: attributes set on it would not reach the optimizer that steps."""

    class Forwarding(torch.optim.Optimizer):
        def __init__(self, inner):
            self.inner = inner

        def __getattr__(self, name):
            return getattr(self.__dict__["inner"], name)

        def step(self):
            self.inner.step()

    param, scaler = weight(torch.float32), started()
    made = Forwarding(torch.optim.SGD([param], lr=0.1, fused=True))
    assert made._step_supports_amp_scaling
    scaler.step(made)
    assert param.item() == pytest.approx(0.8)


def test_an_optimizer_with_amp_support_of_its_own_keeps_it():
    class Supports(torch.optim.SGD):
        def step(self, closure=None):
            self.got = (self.grad_scale.item(), self.found_inf.item())

    class Third(torch.optim.Optimizer):
        _step_supports_amp_scaling = True

        def __init__(self, params):
            super().__init__(params, {})

        step = Supports.step

    param, scaler = weight(torch.float32), started()
    optimizer = Third([param])
    scaler.step(optimizer)
    assert optimizer.got == (SCALE, 0)


# Trainers' wrappers --------------------------------------------------------------------------------


def lightning_wrapper(inner):
    core = pytest.importorskip(
        "lightning.pytorch.core.optimizer", reason="pip install fusedamp[integrations]"
    )
    made = core.LightningOptimizer(inner)
    made._strategy = types.SimpleNamespace(optimizer_step=lambda optimizer, closure, **_: optimizer.step())
    return made


def fabric_wrapper(inner):
    core = pytest.importorskip("lightning.fabric.wrappers", reason="pip install fusedamp[integrations]")
    return core._FabricOptimizer(
        inner, types.SimpleNamespace(optimizer_step=lambda optimizer, **_: optimizer.step())
    )


@pytest.mark.integration
@pytest.mark.filterwarnings("ignore")
@KINDS
@pytest.mark.parametrize("wrap", [lightning_wrapper, fabric_wrapper])
def test_wrappers_of_trainers(kind, wrap):
    param, scaler = weight(torch.float32), started()
    inner = kind([param], lr=0.1)
    made = wrap(inner)
    scaler.clip_grad_norm_(made, 1.0)
    scaler.step(made)
    assert param.item() == pytest.approx(0.9, abs=1e-6)
    scaler.update()
    param.grad.fill_(math.inf)
    scaler.step(made)
    assert param.item() == pytest.approx(0.9, abs=1e-6)
    assert scaler.last_step_skipped
    assert made.state is inner.state
    if wrap is lightning_wrapper:
        assert copy.deepcopy(made).param_groups[0]["lr"] == 0.1
