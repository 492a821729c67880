"""Masters follow the weights: whatever a user writes into a parameter counts, and is never undone."""

import copy

import pytest
import torch
from cases import BY_NAME, COMPOSED, MAIN, bits, make_params, set_grads
from storage_reference import followed

HALVES = [torch.bfloat16, torch.float16]


def clamp(model: torch.nn.Module) -> None:
    for p in model.parameters():
        p.data.clamp_(-0.05, 0.05)


def copy_into(model: torch.nn.Module) -> None:
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.full_like(p, 0.25))


def copy_into_data(model: torch.nn.Module) -> None:
    for p in model.parameters():
        p.data.copy_(torch.full_like(p, 0.25))


def replace_data(model: torch.nn.Module) -> None:
    for p in model.parameters():
        p.data = torch.full_like(p, 0.25)


def swap_in_average(model: torch.nn.Module) -> None:
    torch.nn.utils.vector_to_parameters(torch.linspace(-1, 1, 65).to(model.weight.dtype), model.parameters())


def load(model: torch.nn.Module) -> None:
    torch.manual_seed(5)
    model.load_state_dict(torch.nn.Linear(12, 5, dtype=model.weight.dtype).state_dict())


def write_one_element(model: torch.nn.Module) -> None:
    model.weight.data[2, 3] = 7.0


def make(case, dtype):
    torch.manual_seed(0)
    model = torch.nn.Linear(12, 5, dtype=dtype)
    return model, case.ours(model.parameters(), **case.options)


@pytest.mark.parametrize(
    "write",
    [clamp, copy_into, copy_into_data, replace_data, swap_in_average, load, write_one_element],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_master_follows_a_write(case, dtype, write):
    """Guards users' writes: the next step starts from them; other elements keep their master."""
    model, optimizer = make(case, dtype)
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    masters = [optimizer.state[p]["master"].clone() for p in model.parameters()]
    write(model)
    expected = []
    for p, master in zip(model.parameters(), masters, strict=True):
        expected.append(followed(master, p.detach()))
    optimizer.param_groups[0]["lr"] = 0.0  # a step that moves nothing shows where it starts from
    optimizer.step()
    for p, value in zip(model.parameters(), expected, strict=True):
        assert bits(optimizer.state[p]["master"]) == bits(value)
        assert bits(p) == bits(value.to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_loaded_after_the_optimizer_was_built(dtype):
    """Guards the order: Apex writes masters made in the constructor over weights that are loaded later."""
    model, optimizer = make(BY_NAME["adamw"], dtype)
    load(model)
    loaded = [p.detach().clone() for p in model.parameters()]
    set_grads(list(model.parameters()), 0)
    optimizer.step()
    twin, other = make(BY_NAME["adamw"], dtype)
    for p, q in zip(twin.parameters(), loaded, strict=True):
        p.data = q
    set_grads(list(twin.parameters()), 0)
    other.step()
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("model_first", [True, False])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_checkpoint_loads_in_either_order(dtype, model_first):
    """Guards resume: model then optimizer, or optimizer then model, continue bit for bit."""
    case = BY_NAME["adamw"]
    model, optimizer = make(case, dtype)
    for s in range(3):
        set_grads(list(model.parameters()), s)
        optimizer.step()
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    torch.manual_seed(9)
    resumed = torch.nn.Linear(12, 5, dtype=dtype)
    other = case.ours(resumed.parameters(), **case.options)
    set_grads(list(resumed.parameters()), 77)
    other.step()  # masters exist, of weights that the checkpoint replaces
    loads = [lambda: resumed.load_state_dict(saved[0]), lambda: other.load_state_dict(saved[1])]
    for do in loads if model_first else reversed(loads):
        do()
    for s in range(3, 6):
        for m, o in ((model, optimizer), (resumed, other)):
            set_grads(list(m.parameters()), s)
            o.step()
    for p, q in zip(model.parameters(), resumed.parameters(), strict=True):
        assert bits(p) == bits(q)
        assert bits(optimizer.state[p]["master"]) == bits(other.state[q]["master"])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_averaged_models_work(dtype):
    """Guards SWA and EMA: averages of the weights can be swapped in, and training continues from them."""
    model, optimizer = make(BY_NAME["sgd-nesterov"], dtype)
    swa = torch.optim.swa_utils
    average = swa.AveragedModel(model, multi_avg_fn=swa.get_ema_multi_avg_fn(0.5))
    for s in range(3):
        set_grads(list(model.parameters()), s)
        optimizer.step()
        average.update_parameters(model)
    model.load_state_dict(average.module.state_dict())
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    for p, q in zip(model.parameters(), average.module.parameters(), strict=True):
        assert torch.equal(p, q)
        assert torch.equal(optimizer.state[p]["master"].to(dtype), q)  # kept where it rounds to the average


def test_dtype_changed_after_the_first_step():
    """Guards model.half() and model.float() between steps: masters come and go with the parameter's dtype."""
    model, optimizer = make(BY_NAME["adamw"], torch.float32)
    for dtype in (torch.float32, torch.float16, torch.float64, torch.bfloat16):
        model.to(dtype)
        set_grads(list(model.parameters()), 0)
        optimizer.step()
        for p in model.parameters():
            state = optimizer.state[p]
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            assert ("master" in state) == (dtype in HALVES)
            assert state["exp_avg"].dtype == wide
    assert state["step"] == 4


def test_master_weights_option_can_change():
    """Guards the group option: "none" drops the master, "auto" makes it from the weights again."""
    params = make_params(torch.bfloat16)
    optimizer = BY_NAME["sgd"].ours(params, lr=0.1)
    set_grads(params, 0)
    for mode, has_master in (("auto", True), ("none", False), ("fp32", True)):
        optimizer.param_groups[0]["master_weights"] = mode
        optimizer.step()
        assert all(("master" in optimizer.state[p]) == has_master for p in params)


def test_groups_added_later_are_stepped():
    """Guards groups that join after the first step: they get masters and states of their own."""
    first, second = make_params(torch.bfloat16, [(5,), (6,)])
    optimizer = BY_NAME["adamw"].ours([first])
    set_grads([first, second], 0)
    optimizer.step()
    optimizer.add_param_group({"params": [second]})
    before = second.detach().clone()
    optimizer.step()
    assert not torch.equal(second, before)
    assert [optimizer.state[p]["step"].item() for p in (first, second)] == [2, 1]
    assert torch.equal(optimizer.state[second]["master"].bfloat16(), second)


def test_versions_move():
    """Guards autograd: a step moves the version counter of every parameter, which torch's fused steps
    don't.
    """
    for dtype in (torch.float32, torch.bfloat16, torch.complex64):
        param = torch.nn.Parameter(torch.ones(4, dtype=dtype))
        param.grad = torch.ones_like(param)
        optimizer = BY_NAME["adamw"].ours([param])
        optimizer.step()
        before = param._version
        optimizer.step()
        assert param._version > before
