"""Steps in the backward pass: the bits of the plain optimizer, freed gradients, and what is refused."""

import copy
import gc
import pickle

import fusedamp
import pytest
import torch
from cases import CASES, make_params
from fusedamp import GradScaler, optim
from fusedamp.ops import inputs
from fusedamp.optim import in_backward, step_in_backward
from pretend_device import loss_of
from torch import nn
from torch.utils.checkpoint import checkpoint

HALF = torch.bfloat16
FORMATS = {
    "fp32": {},
    "split-int8": {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 3},
    "stochastic": {"master_weights": "none", "stochastic_rounding": True, "rounding_seed": 3},
}


@pytest.fixture(autouse=True)
def nothing_is_left():
    yield
    inputs.stepping_in_backward.clear()


def assert_equal(one, other):
    for i, (p, q) in enumerate(zip(one, other, strict=True)):
        assert torch.equal(p, q), i


def assert_same_state(one, other):
    assert one["param_groups"] == other["param_groups"]
    for key, entry in one["state"].items():
        for name, value in entry.items():
            found = other["state"][key][name]
            assert torch.equal(value, found) if isinstance(value, torch.Tensor) else value == found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_optimizer(case):
    params = [*make_params(HALF), *make_params(torch.float32)]
    others = copy.deepcopy(params)
    plain, released = case.ours(params, **case.options), case.ours(others, **case.options)
    step_in_backward(released)
    for s in range(3):
        loss_of(params, s).backward()
        plain.step()
        plain.zero_grad()
        loss_of(others, s).backward()
        assert all(p.grad is None for p in others)
        assert_equal(params, others)
        released.step()
    assert_same_state(plain.state_dict(), released.state_dict())


@pytest.mark.parametrize("form", FORMATS)
def test_groups_schedule_and_late_gradients(form):
    """A parameter that is not used in each step has its own step count; positions choose random numbers."""
    params = make_params(HALF, [(8, 4), (5,), (3, 3), (7,)])
    others = copy.deepcopy(params)
    sides = []
    for some in (params, others):
        groups = [{"params": some[:2]}, {"params": some[2:], "lr": 0.1, "weight_decay": 0.3}]
        optimizer = optim.AdamW(groups, lr=1e-2, **FORMATS[form])
        sides.append((some, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)))
    step_in_backward(sides[1][1])
    for s in range(8):
        for some, optimizer, schedule in sides:
            used = some if s % 3 else [some[0], some[3]]
            loss_of(used, s).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            if s == 4:
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            if s == 5:
                optimizer.state[some[1]]["exp_avg"] = optimizer.state[some[1]]["exp_avg"] * 2
                optimizer.param_groups[0]["betas"] = (0.5, 0.9)
        assert_equal(params, others)
    assert_same_state(sides[0][1].state_dict(), sides[1][1].state_dict())
    assert sides[1][1].state[others[0]]["step"] == 8
    assert sides[1][1].state[others[1]]["step"] == 5


class Net(nn.Module):
    """Tied embedding and head, and layers that may be checkpointed."""

    def __init__(self, reentrant=None, dtype=HALF):
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(11, 16)
        self.layers = nn.ModuleList(nn.Linear(16, 16) for _ in range(6))
        self.reentrant = reentrant
        self.to(dtype)

    def forward(self, tokens):
        x = self.words(tokens)
        for layer in self.layers:
            run = (
                layer
                if self.reentrant is None
                else lambda x, f=layer: checkpoint(f, x, use_reentrant=self.reentrant)
            )
            x = x + run(x).tanh()
        return nn.functional.linear(x, self.words.weight).float().square().mean()


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "checkpoint", "re-entrant"])
def test_tied_weights_and_checkpoints(reentrant):
    plain, released = Net(reentrant), Net(reentrant)
    one, other = (optim.AdamW(net.parameters(), lr=1e-2) for net in (plain, released))
    step_in_backward(other)
    for s in range(4):
        tokens = torch.arange(5 * s, 5 * s + 5) % 11
        for net, optimizer in ((plain, one), (released, other)):
            net(tokens).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert_equal(plain.parameters(), released.parameters())


@pytest.mark.parametrize(("dtype", "size"), [(HALF, 2), (torch.float32, 4)], ids=str)
def test_only_one_gradient_is_alive(dtype, size):
    """Guards the saving: 2 or 4 bytes per parameter at the peak."""

    def peak(release):
        net = Net(dtype=dtype)
        params, found = list(net.parameters()), []
        for param in params:
            param.register_post_accumulate_grad_hook(
                lambda _: found.append(sum(p.grad.nbytes for p in params if p.grad is not None))
            )
        optimizer = optim.AdamW(params)
        if release:
            step_in_backward(optimizer)
        net(torch.arange(5)).backward()
        return max(found), sum(p.numel() for p in params), max(p.numel() for p in params)

    whole, count, _ = peak(False)
    largest, _, most = peak(True)
    assert whole == size * count
    assert largest == size * most


def test_step_updates_what_is_left():
    """Gradients set by hand, and groups added later."""
    params = make_params(HALF, [(4,), (5,), (6,)])
    others = copy.deepcopy(params)
    plain, released = optim.SGD(params[:2], lr=0.5), optim.SGD(others[:2], lr=0.5)
    step_in_backward(released)
    for some, optimizer in ((params, plain), (others, released)):
        optimizer.add_param_group({"params": [some[2]]})
        some[0].grad = torch.ones_like(some[0])
        loss_of(some[1:], 0).backward()
        optimizer.step()
    assert_equal(params, others)


def test_hooks_and_closures():
    params = make_params(HALF, [(4,), (5,)])
    others = copy.deepcopy(params)
    plain, released = optim.SGD(params, lr=0.5), optim.SGD(others, lr=0.5)
    step_in_backward(released)
    calls = []
    released.register_step_post_hook(lambda *_: calls.append("step"))

    def closure(some):
        loss = loss_of(some, len(calls))
        loss.backward()
        return loss

    for _ in range(2):
        plain.zero_grad()
        plain.step(lambda: closure(params))
        released.step(lambda: closure(others))
    assert calls == ["step", "step"]


def test_the_handle_ends_it():
    params = make_params(HALF, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    handle = step_in_backward(optimizer)
    handle.remove()
    handle.remove()
    loss_of(params, 0).backward()
    assert params[0].grad is not None
    GradScaler("cpu", enabled=False).step(optimizer)
    step_in_backward(optimizer)


def test_it_ends_with_the_optimizer():
    """Hooks of an optimizer that was replaced must not step too."""
    params = make_params(HALF, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    del optimizer
    gc.collect()
    before = params[0].detach().clone()
    loss_of(params, 0).backward()
    assert torch.equal(before, params[0])
    assert params[0].grad is not None
    assert not inputs.stepping_in_backward


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_copies_step_in_step(copied):
    params = make_params(HALF, [(4,)])
    optimizer = optim.AdamW(params)
    step_in_backward(optimizer)
    loss_of(params, 0).backward()
    optimizer.step()
    others, other = copied((params, optimizer))
    loss_of(others, 1).backward()
    assert others[0].grad is not None
    other.step()
    loss_of(params, 1).backward()
    assert_equal(params, others)


def test_parameters_that_left_the_optimizer_are_left_alone():
    params = make_params(HALF, [(4,), (5,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    loss_of(params, 0).backward()
    optimizer.step()
    optimizer.param_groups[0]["params"] = params[1:]
    before = params[0].detach().clone()
    loss_of(params, 0).backward()
    assert torch.equal(before, params[0])
    assert params[0].grad is not None
    assert params[1].grad is None


# Refused by name.


def test_accumulation_is_refused():
    params = make_params(HALF, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    loss_of(params, 0).backward()
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match=r"\[step_in_backward\] group 0 params\[0\] got a second gradient"):
        loss_of(params, 1).backward()
    assert torch.equal(before, params[0])
    params[0].grad = None
    optimizer.step()
    loss_of(params, 1).backward()


def test_a_weight_shared_by_reentrant_checkpoints_is_refused():
    layer = nn.Linear(4, 4)
    optimizer = optim.SGD(layer.parameters(), lr=0.5)
    step_in_backward(optimizer)
    x = torch.ones(2, 4, requires_grad=True)
    for _ in range(2):
        x = checkpoint(layer, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match="a weight shared by several re-entrant checkpoints"):
        x.sum().backward()


@pytest.mark.parametrize("kind", [GradScaler, torch.amp.GradScaler])
def test_scalers_are_refused(kind):
    params = make_params(torch.float32, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    scaler = kind("cpu", init_scale=2.0)
    scaler.scale(loss_of(params, 0)).backward()
    error, match = (
        (RuntimeError, "steps in the backward pass") if kind is GradScaler else (AssertionError, "inf checks")
    )
    with pytest.raises(error, match=match):
        scaler.step(optimizer)
    if kind is GradScaler:
        for call in (scaler.unscale_, lambda o: scaler.clip_grad_norm_(o, 1.0)):
            with pytest.raises(
                RuntimeError, match=r"\[GradScaler\.\w+\] the optimizer steps in the backward"
            ):
                call(optimizer)


def test_clipping_is_refused():
    params = make_params(HALF, [(4,)])
    others = make_params(HALF, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match=r"\[clip_grad_norm_\] the optimizer steps in the backward pass"):
        fusedamp.clip_grad_norm_(params, 1.0)
    loss_of(others, 0).backward()
    fusedamp.clip_grad_norm_(others, 1.0)


def test_plain_parameters_on_several_ranks_are_refused(monkeypatch):
    params = make_params(HALF, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    monkeypatch.setattr(in_backward, "is_distributed", lambda: True)
    before = params[0].detach().clone()
    with pytest.raises(RuntimeError, match="plain parameter on several ranks"):
        loss_of(params, 0).backward()
    assert torch.equal(before, params[0])


@pytest.mark.filterwarnings("ignore:Using backward")  # torch warns of a reference cycle
def test_a_gradient_with_a_graph_is_refused():
    params = make_params(torch.float32, [(4,)])
    optimizer = optim.SGD(params, lr=0.5)
    step_in_backward(optimizer)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        params[0].square().sum().backward(create_graph=True)


class Stepping(optim.SGD):
    def step(self, closure=None):
        return super().step(closure)


def test_bad_arguments():
    params = make_params(HALF, [(4,)])
    for optimizer, match in [
        (torch.optim.SGD(params), "optimizer is SGD; expected an optimizer of fusedamp.optim"),
        (optim.Offloaded(optim.SGD, params), "optimizer is Offloaded"),
        (Stepping(params), "Stepping overrides step"),
    ]:
        with pytest.raises(TypeError, match=match):
            step_in_backward(optimizer)
    optimizer = optim.SGD(params)
    step_in_backward(optimizer)
    with pytest.raises(ValueError, match="steps in the backward pass already"):
        step_in_backward(optimizer)
    shared = nn.Parameter(params[0].data[1:])
    with pytest.raises(ValueError, match="two parameters share memory"):
        step_in_backward(optim.SGD([*params, shared]))
