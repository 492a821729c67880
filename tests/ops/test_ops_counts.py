"""Step counts: FP32 numbers that never stand still; invalid ones are refused."""

import math

import pytest
import torch
from fusedamp import ops, optim
from fusedamp.tensors import addresses
from op_calls import scalar, step_call
from op_refusals import bad_value, check, put

FROM_2_24 = [2.0**24 - 1, 2.0**24, 2.0**24 + 2, 2.0**24 + 4, 2.0**24 + 6]
WRONG = [math.nan, math.inf, -math.inf, -1.0, 0.5, 1e30, 2.0**63]


def test_counts_go_on_in_float32s_own_steps():
    """One more up to 2^24, then the next larger float32; huge counts increase, too."""
    call = step_call("sgd", [(3,)], torch.float32)
    for start, wanted in ((FROM_2_24[0], FROM_2_24), (2.0**30, [2.0**30, 2.0**30 + 128])):
        call.steps[0].fill_(start)
        for count in wanted[1:]:
            call.run()
            assert call.steps[0].item() == count
    call.steps[0].fill_(2.0**62)  # the largest count
    call.run()
    assert call.steps[0].item() == 2.0**62


@pytest.mark.parametrize("make", [optim.Adafactor, optim.Muon])
def test_composed_steps_count_the_same(make):
    param = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = make([param], lr=1e-3)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.state[param]["step"].fill_(FROM_2_24[0])
    for count in FROM_2_24[1:]:
        optimizer.step()
        assert optimizer.state[param]["step"].item() == count


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("start", [0.0, 2.0**24, 2.0**40])
def test_every_step_draws_its_own_random_numbers(start, dtype):
    """160 stochastic steps of 1/16 of a unit: a binomial sum, of mean 10 and variance 160 * 15 / 256."""
    numel, unit = 2**14, torch.finfo(dtype).eps
    weights, grads = torch.full((numel,), 1.5, dtype=dtype), torch.full((numel,), -1.0)
    steps = [scalar(start)]
    for _ in range(160):
        ops.sgd_([weights], [grads], [], [], steps, lr=unit / 16, stochastic_rounding=True)
    moved = (weights.double() - 1.5) / unit
    deviation = math.sqrt(160 * 15 / 256)
    assert abs(moved.mean().item() - 10) < 6 * deviation / math.sqrt(numel)
    assert abs(moved.std().item() / deviation - 1) < 6 / math.sqrt(2 * numel)


@pytest.mark.host
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("variant", ["adamw", "sgd", "lamb"])
def test_what_is_no_count_is_refused_on_the_cpu(variant, wrong):
    call = step_call(variant, [(3,), (2, 2)], torch.float32)
    put("steps", 1, lambda t: t.fill_(wrong))(call)
    op = f"{variant}_"
    check(
        call.run,
        call.tensors(),
        op,
        bad_value(None, "steps[1] is ", "expected a whole number from 0 to 2^62"),
    )


@pytest.mark.host
@pytest.mark.parametrize("wrong", WRONG)
def test_what_is_no_count_is_refused_in_replayed_steps(wrong):
    param = torch.nn.Parameter(torch.ones(4))
    optimizer = optim.SGD([param], lr=0.1)
    param.grad = torch.ones(4)
    for _ in range(3):
        optimizer.step()
    assert addresses.read([param]) is not None
    before = param.detach().clone()
    optimizer.state[param]["step"].fill_(wrong)
    for _ in range(3):
        with pytest.raises(
            (ValueError, RuntimeError),
            match=r"\[SGD\] group 0: params\[0\] has step count .*expected a whole number",
        ):
            optimizer.step()
    assert torch.equal(param, before)
