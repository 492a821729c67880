"""Tensors removed from an optimizer's state are freed immediately, as in torch."""

import gc
import weakref

import pytest
import torch
from cases import COMPOSED, MAIN, make_params, set_grads
from fusedamp import optim

FORMATS = [{}, {"master_weights": "split", "state_dtype": "int8"}]
REMOVALS = {
    "del": lambda state, param: state.__delitem__(param),
    "pop": lambda state, param: state.pop(param),
    "clear": lambda state, param: state.clear(),
    "entry cleared": lambda state, param: state[param].clear(),
    "entry replaced": lambda state, param: state.update({param: {}}),
}


def references(entry):
    return [weakref.ref(value) for value in entry.values() if isinstance(value, torch.Tensor)]


@pytest.fixture(autouse=True)
def _no_collector():
    """Reference counts alone must free it."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("steps", [1, 2, 3, 9], ids=lambda n: f"after {n}")
@pytest.mark.parametrize("removal", REMOVALS.values(), ids=REMOVALS)
@pytest.mark.parametrize("options", FORMATS, ids=["fp32", "compressed"])
def test_states_are_freed_at_once(options, removal, steps):
    params = make_params(torch.bfloat16)
    optimizer = optim.AdamW(params, **options)
    for step in range(steps):
        set_grads(params, step)
        optimizer.step()
    dead = references(optimizer.state[params[1]])
    removal(optimizer.state, params[1])
    assert [ref() for ref in dead] == [None] * len(dead)
    set_grads(params, steps)
    optimizer.step()  # and starts over
    assert optimizer.state[params[1]]["step"] == 1


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_a_removed_group_is_freed_with_its_parameters(case):
    kept, gone = make_params(torch.float32), make_params(torch.float32, seed=1)
    optimizer = case.ours([{"params": kept}, {"params": gone}], **case.options)
    for step in range(4):
        set_grads(kept, step)
        set_grads(gone, step)
        optimizer.step()
    dead = [weakref.ref(param) for param in gone]
    del optimizer.param_groups[1]
    for param in gone:
        del optimizer.state[param]
    del gone, param
    assert [ref() for ref in dead] == [None] * len(dead)


def test_the_optimizer_itself_is_freed():
    params = make_params(torch.bfloat16)
    optimizer = optim.AdamW(params)
    for step in range(5):
        set_grads(params, step)
        optimizer.step()
    dead = [weakref.ref(optimizer), *references(optimizer.state[params[1]])]
    del optimizer
    assert [ref() for ref in dead] == [None] * len(dead)
