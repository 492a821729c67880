"""Guarantees of single optimizers beyond the common tests: limits of their formulas."""

import pytest
import torch
from fusedamp import optim


def stepped(kind, grads, *, start=1.0, dtype=torch.float32, **options):
    """A parameter after one step per gradient, and its state."""
    param = torch.nn.Parameter(torch.full((4,), start, dtype=dtype))
    optimizer = kind([param], **options)
    for grad in grads:
        param.grad = torch.full_like(param, grad)
        optimizer.step()
    return param.detach(), optimizer.state[param]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_centered_rmsprop_of_a_constant_gradient_is_finite(momentum):
    """Guards the variance: of a constant gradient it ends at 0, where roundings bring it below."""
    options = dict(centered=True, alpha=0.5, momentum=momentum, lr=1e-9, weight_decay=0.0)
    for grad in (0.1, 0.3, -0.7, 1e3):
        param, state = stepped(optim.RMSprop, [grad] * 200, **options)
        assert param.isfinite().all()
        assert state["square_avg"].isfinite().all()


def test_lion_stands_still_without_gradient_and_moves_by_lr_else():
    """Guards sign(): 0 of 0, and no more than 1 of anything."""
    assert torch.equal(stepped(optim.Lion, [0.0], lr=0.5)[0], torch.ones(4))
    for grad in (1e-30, 1e30):
        assert torch.equal(stepped(optim.Lion, [grad], lr=0.25)[0], torch.full((4,), 0.75))
        assert torch.equal(stepped(optim.Lion, [-grad], lr=0.25)[0], torch.full((4,), 1.25))


def test_adagrad_starts_its_sum_where_the_constructor_says():
    """Guards initial_accumulator_value, also for complex parameters, as torch has it."""
    for dtype in (torch.float32, torch.bfloat16, torch.float64, torch.complex64):
        _, state = stepped(optim.Adagrad, [0.0], dtype=dtype, initial_accumulator_value=0.25)
        start = 0.25 + 0.25j if dtype.is_complex else 0.25
        assert (state["sum"] == start).all()


def test_radam_steps_by_momentum_until_its_length_is_5():
    """Guards the threshold: at beta2 = 0.999 the sixth step is the first to divide by the second moment."""
    for steps in range(1, 8):
        _, state = stepped(optim.RAdam, [1.0] * steps, lr=1e-3)
        moved = (
            stepped(optim.RAdam, [1.0] * steps, lr=1e-3)[0]
            - stepped(optim.RAdam, [1.0] * (steps - 1), lr=1e-3)[0]
        )
        plain = (moved + 1e-3).abs() < 1e-6  # lr times the mean gradient
        assert plain.all() == (steps < 6)
        assert state["step"] == steps


def test_rmsprop_options_can_change_between_steps():
    """Guards groups that are edited: states appear when they are first used, and stay."""
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = optim.RMSprop([param], lr=1e-2)
    for change in ({}, {"centered": True}, {"momentum": 0.9}, {"centered": False}):
        optimizer.param_groups[0].update(change)
        param.grad = torch.ones_like(param)
        optimizer.step()
    state = optimizer.state[param]
    assert [*state] == ["step", "square_avg", "master", "grad_avg", "momentum_buffer"]
    assert state["step"] == 4


def test_momentum_that_starts_late_starts_undampened():
    """As torch: the buffer begins with the first gradient that it sees, however many steps came before."""
    start = torch.tensor([1.0, -2.0])
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    pairs = [(kind([param], lr=0.1, dampening=0.5), param) for kind, param in
             ((optim.SGD, ours), (torch.optim.SGD, theirs))]  # fmt: skip
    for step in range(5):
        for optimizer, param in pairs:
            optimizer.param_groups[0]["momentum"] = 0.9 if step >= 2 else 0.0
            param.grad = torch.tensor([0.5, 0.25]) * (step + 1)
            optimizer.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0.0)


def test_groups_that_share_memory_are_refused():
    """Guards what no op can see: each group is a call of its own."""
    memory = torch.zeros(6)
    one, other = torch.nn.Parameter(memory[:4]), torch.nn.Parameter(memory[2:])
    one.grad, other.grad = torch.ones(4), torch.ones(4)
    optimizer = optim.SGD([{"params": [one]}, {"params": [other], "lr": 0.5}], lr=0.1)
    with pytest.raises(ValueError, match="two parameters share memory"):
        optimizer.step()
    assert not memory.any()
