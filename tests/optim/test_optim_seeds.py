"""Random numbers of stochastic rounding: optimizers draw different numbers, and runs resume exactly."""

import copy
import inspect

import pytest
import torch
from cases import MAIN, kept
from fusedamp import optim

RANDOM = {"master_weights": "none", "stochastic_rounding": True}


def walk(optimizers, params, steps, grad=1.0):
    for _ in range(steps):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = torch.full_like(param, grad)
            optimizer.step()
    return torch.cat([p.detach().float().reshape(-1) for p in params])


def weights(count, numel=1, value=1.5):
    return [torch.nn.Parameter(torch.full((numel,), value, dtype=torch.bfloat16)) for _ in range(count)]


@pytest.mark.parametrize(
    "options", [RANDOM, {"state_dtype": "int8"}, {"state_dtype": torch.bfloat16}], ids=str
)
def test_optimizers_of_one_program_draw_apart(options):
    """64 of one weight each, as with a step in backward: the spread of their moves is a binomial's."""
    params = weights(64, 1 if options is RANDOM else 512)
    optimizers = [
        optim.SGD([p], lr=2.0**-11, momentum=0.0 if options is RANDOM else 0.9, **options) for p in params
    ]
    ends = walk(optimizers, params, 160, grad=1.0 if options is RANDOM else 0.3)
    if options is RANDOM:  # each step moves a weight by a unit of 2^-7 with probability 1/16
        moved = (1.5 - ends.double()) * 2**7
        assert abs(moved.mean() - 10) < 5 * 3.1 / 8
        assert 3.1 / 2 < moved.std() < 3.1 * 2
    else:
        states = [kept(o.state[p])["momentum_buffer"] for o, p in zip(optimizers, params, strict=True)]
        assert len({tuple(s.float().tolist()) for s in states}) == 64


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_the_seed_is_a_documented_keyword(case):
    parameter = inspect.signature(case.ours).parameters["rounding_seed"]
    assert parameter.kind is parameter.KEYWORD_ONLY
    assert parameter.default is None
    ends = []
    for seed in (3, 3, 4):
        params = weights(1, 4096)
        optimizer = case.ours(params, **case.options, **RANDOM, rounding_seed=seed)
        generator = torch.Generator().manual_seed(0)
        params[0].grad = torch.randn(4096, generator=generator).bfloat16()
        optimizer.step()
        ends.append(params[0].detach())
    assert torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_nothing_is_drawn_without_need():
    """Seeds are numbers of this process's optimizers; those that round to nearest don't count, and torch's
    generators are left alone.
    """
    state = torch.get_rng_state()
    plain = optim.SGD(weights(1))
    first, second = (optim.SGD(weights(1), **RANDOM) for _ in range(2))
    assert plain.param_groups[0]["rounding_seed"] is None
    assert second.param_groups[0]["rounding_seed"] == first.param_groups[0]["rounding_seed"] + 1
    assert torch.equal(torch.get_rng_state(), state)


def test_groups_of_one_optimizer_share_its_seed_and_draw_apart():
    optimizer = optim.SGD([{"params": [p]} for p in weights(2, 4096)], lr=2.0**-11, **RANDOM)
    optimizer.add_param_group({"params": weights(1, 4096)})
    params = [group["params"][0] for group in optimizer.param_groups]
    assert len({group["rounding_seed"] for group in optimizer.param_groups}) == 1
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not torch.equal(params[0], params[1])
    assert not torch.equal(params[1], params[2])


def test_a_resumed_run_draws_as_the_first_would_have():
    """Saved and loaded into an optimizer that would draw otherwise; by deepcopy, too."""
    params = weights(1, 4096)
    optimizer = optim.SGD(params, lr=2.0**-11, **RANDOM)
    walk([optimizer], params, 3)
    twin = copy.deepcopy(optimizer)
    copies = [torch.nn.Parameter(params[0].detach().clone())]
    other = optim.SGD(copies, lr=2.0**-11, **RANDOM)
    other.load_state_dict(optimizer.state_dict())
    ends = [walk([one], one.param_groups[0]["params"], 3) for one in (optimizer, twin, other)]
    assert torch.equal(ends[0], ends[1])
    assert torch.equal(ends[0], ends[2])


def test_a_checkpoint_without_seed_keeps_the_present_one():
    params = weights(1)
    optimizer = optim.SGD(params, rounding_seed=7, **RANDOM)
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["rounding_seed"]
    optimizer.load_state_dict(saved)
    assert optimizer.param_groups[0]["rounding_seed"] == 7


@pytest.mark.parametrize("start", [0, 2**24, 2**24 + 2, 2**30])
def test_counts_beyond_fp32s_whole_numbers_draw_anew(start):
    """From 2^24 on FP32's next number is 2 away; a count that stood still would draw the same for ever."""
    params = weights(1, 512)
    optimizer = optim.SGD(params, lr=2.0**-11, **RANDOM, rounding_seed=0)
    walk([optimizer], params, 1)
    optimizer.state[params[0]]["step"].fill_(float(start))
    params[0].data.fill_(1.5)
    ends = walk([optimizer], params, 160)
    moved = (1.5 - ends.double()) * 2**7
    assert abs(moved.mean() - 10) < 5 * 3.1 / 512**0.5
    assert 2.5 < moved.std() < 3.7
    assert (moved == 0).float().mean() < 0.01
