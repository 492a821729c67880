"""An error in one group leaves all others unchanged, in a first step and in a repeated one.

Guards gradients that lie in another parameter's memory: stepping one group would change what the next reads.
"""

import pytest
import torch
from cases import BY_NAME, COMPOSED, MAIN, kept
from fusedamp import optim

CASES = [*MAIN, *COMPOSED, BY_NAME["sgd-momentum"]]


def make(case, groups):
    """Three matrices of one group each, or all of one; with gradients."""
    params = [torch.nn.Parameter(torch.full((4, 4), float(i + 1))) for i in range(3)]
    given = [{"params": [p]} for p in params] if groups else params
    optimizer = case.ours(given, **case.options)
    for p in params:
        p.grad = torch.ones(4, 4)
    return params, optimizer


def everything(params, optimizer):
    states = [value for p in params for value in kept(optimizer.state.get(p, {})).values()]
    return [t.detach().clone() for t in (*params, *states)]


ALIASES = {
    "another's weight": lambda params: setattr(params[2], "grad", params[0].detach()),
    "its own weight": lambda params: setattr(params[2], "grad", params[2].detach()),
    "a part of another's": lambda params: setattr(
        params[2],
        "grad",
        torch.cat((params[0].detach(), params[0].detach())).set_(
            params[0].detach().untyped_storage(), 0, (4, 4), (4, 1)
        ),
    ),
}


@pytest.mark.parametrize("steps", [0, 1, 4], ids=["first", "second", "repeated"])
@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("alias", ALIASES.values(), ids=ALIASES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_gradient_in_a_weights_memory_is_refused(case, alias, groups, steps):
    params, optimizer = make(case, groups)
    for _ in range(steps):
        optimizer.step()
    alias(params)
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    after = everything(params, optimizer)  # a first step has made states by then
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=steps > 0))
    params[2].grad = torch.ones(4, 4)
    optimizer.step()
    twins, expected = make(case, groups)
    for _ in range(steps + 1):
        expected.step()
    for ours, wanted in zip(params, twins, strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("steps", [1, 5])
def test_a_gradient_that_is_a_state_is_refused(steps):
    params = [torch.nn.Parameter(torch.ones(8)) for _ in range(2)]
    optimizer = optim.SGD(params, lr=0.1, momentum=0.9)
    for _ in range(steps):
        for param in params:
            param.grad = torch.ones(8)
        optimizer.step()
    params[1].grad = optimizer.state[params[0]]["momentum_buffer"]
    before = everything(params, optimizer)
    with pytest.raises(ValueError, match="shares memory with"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(everything(params, optimizer), before, strict=True))


@pytest.mark.parametrize(
    ("one", "other", "share"),
    [
        ((slice(None), slice(0, 3)), (slice(None), slice(2, 4)), True),
        ((slice(None), slice(0, 3)), (slice(None), slice(0, 4)), True),
        ((slice(None), slice(0, 2)), (slice(None), slice(2, 4)), False),
        ((slice(0, 4, 2), slice(None)), (slice(1, 4, 2), slice(None)), False),
        ((slice(0, 3), slice(None)), (slice(2, 4), slice(None)), True),
    ],
)
def test_parameters_that_share_an_element_are_refused(one, other, share):
    """Also with gaps, where each is stepped on a copy; interleaved ones that share none are not."""
    memory = torch.zeros(4, 4)
    params = [torch.nn.Parameter(memory[place]) for place in (one, other)]
    optimizer = optim.SGD(params, lr=1.0)
    for param in params:
        param.grad = torch.ones(param.shape)
    if share:
        with pytest.raises(ValueError, match="two parameters share memory"):
            optimizer.step()
        assert (memory == 0).all()
    else:
        optimizer.step()
        assert (memory == -1).all()


def test_a_state_that_does_not_fit_in_a_late_group():
    params, optimizer = make(BY_NAME["adamw"], True)
    optimizer.step()
    optimizer.state[params[2]]["exp_avg"] = torch.zeros(3)
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match=r"group 2: params\[0\] has state 'exp_avg' of shape \[3\]"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


def test_a_count_that_is_none_in_a_late_group():
    """In place, so that only the op sees it."""
    params, optimizer = make(BY_NAME["adamw"], True)
    for _ in range(2):
        optimizer.step()
    optimizer.state[params[2]]["step"].fill_(float("nan"))
    before = [p.detach().clone() for p in params]
    with pytest.raises(ValueError, match="nan"):
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(params, before, strict=True))


@pytest.mark.parametrize("use_muon", [None, True])
def test_muon_checks_its_adamw_part_first(use_muon):
    """Only AdamW's op refuses a rate in FP16: the matrix of an earlier group must not move."""
    matrix, vector = torch.nn.Parameter(torch.ones(3, 3)), torch.nn.Parameter(torch.ones(3))
    rate = torch.tensor(0.1, dtype=torch.float16)
    optimizer = optim.Muon([{"params": [matrix], "use_muon": use_muon}, {"params": [vector], "lr": rate}])
    matrix.grad, vector.grad = torch.ones(3, 3), torch.ones(3)
    with pytest.raises(ValueError, match="lr is float16"):
        optimizer.step()
    assert (matrix == 1).all()
    assert (vector == 1).all()
