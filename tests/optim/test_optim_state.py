"""Checkpoints: torch's keys plus ``master``, FP32 kept FP32, exchange with torch.optim, bitwise resume."""

import copy
import io
import pickle

import pytest
import torch
from cases import BY_NAME, CASES, COMPOSED, MAIN, bits, make_params, set_grads

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
HALVES = [torch.bfloat16, torch.float16]


def mixed() -> list[torch.nn.Parameter]:
    return [p for dtype in DTYPES for p in make_params(dtype)]


def train(optimizer, params, steps: range) -> None:
    for s in steps:
        set_grads(params, s)
        optimizer.step()


def through_a_file(state_dict: dict) -> dict:
    """Guards torch.save and torch.load with weights_only, as HF Trainer uses them."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same_state(a, b, params_a, params_b) -> None:
    for p, q in zip(params_a, params_b, strict=True):
        assert bits(p) == bits(q)
        assert a.state[p].keys() == b.state[q].keys()
        for name, value in a.state[p].items():
            assert value.dtype == b.state[q][name].dtype
            assert bits(value) == bits(b.state[q][name]), name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_resume_is_bitwise(case):
    """Guards save and load, through a file read with weights_only=True, mid-training and all dtypes."""
    params = mixed()
    optimizer = case.ours([{"params": params[::2]}, {"params": params[1::2], "lr": 0.05}], **case.options)
    train(optimizer, params, range(3))
    saved, weights = through_a_file(optimizer.state_dict()), [p.detach().clone() for p in params]
    train(optimizer, params, range(3, 6))
    resumed = [torch.nn.Parameter(w) for w in weights]
    other = case.ours([{"params": resumed[::2]}, {"params": resumed[1::2]}], lr=9.0)
    other.load_state_dict(state_dict=saved)
    train(other, resumed, range(3, 6))
    assert_same_state(optimizer, other, params, resumed)
    assert [g["lr"] for g in other.param_groups] == [case.options["lr"], 0.05]


def test_old_sgd_checkpoints():
    """Guards SGD: no step count means one step if there is a buffer, zero if the buffer is None."""
    params = [torch.nn.Parameter(torch.ones(3)) for _ in range(3)]
    optimizer = BY_NAME["sgd-dampening"].ours(params, lr=1.0, momentum=0.5, dampening=0.25)
    state = {0: {"momentum_buffer": torch.full((3,), 4.0)}, 1: {"momentum_buffer": None}}
    group = {
        "lr": 1.0,
        "momentum": 0.5,
        "dampening": 0.25,
        "weight_decay": 0,
        "nesterov": False,
        "params": [0, 1, 2],
    }
    optimizer.load_state_dict({"state": state, "param_groups": [group]})
    for p in params:
        p.grad = torch.ones(3)
    optimizer.step()
    assert [p[0].item() for p in params] == [1 - (0.5 * 4 + 0.75), 0.0, 0.0]
    assert (
        optimizer.param_groups[0]["master_weights"] == "auto"
    )  # what an old group lacks comes from the defaults


def test_old_step_counts_and_lists():
    """Guards the forms that checkpoints come in: int steps, shape [1], CPU tensors; betas as a list (DCP)."""
    for step in (3, 3.0, torch.tensor([3]), torch.tensor(3.0, dtype=torch.float64)):
        param = torch.nn.Parameter(torch.ones(4))
        optimizer = BY_NAME["adamw"].ours([param])
        saved = optimizer.state_dict()
        saved["state"][0] = {"step": step, "exp_avg": torch.ones(4), "exp_avg_sq": torch.ones(4)}
        saved["param_groups"][0]["betas"] = [0.9, 0.99]
        optimizer.load_state_dict(saved)
        param.grad = torch.ones(4)
        optimizer.step()
        assert optimizer.state[param]["step"].dtype == torch.float32
        assert optimizer.state[param]["step"].shape == ()
        assert optimizer.state[param]["step"] == 4


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_loading_copies(case):
    """Guards against aliasing: training on after a load leaves the loaded dict as it was."""
    params = mixed()
    optimizer = case.ours(params, **case.options)
    train(optimizer, params, range(2))
    saved = optimizer.state_dict()
    saved = {"state": dict(saved["state"]), "param_groups": saved["param_groups"]}
    before = pickle.dumps(saved)
    optimizer.load_state_dict(saved)
    train(optimizer, params, range(2, 4))
    assert pickle.dumps(saved) == before


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_loading_ones_own_state_before_any_step(case):
    """Guards what Accelerate does when it wraps an optimizer."""
    params = mixed()
    optimizer = case.ours(params, **case.options)
    optimizer.load_state_dict(optimizer.state_dict())
    train(optimizer, params, range(1))


def test_loaded_state_takes_the_layout_of_the_parameter():
    """Guards resume into channels_last: values stay, strides become the parameter's."""
    values = torch.randn(2, 3, 4, 5)
    ends = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        param = torch.nn.Parameter(torch.zeros(2, 3, 4, 5).contiguous(memory_format=memory_format))
        optimizer = BY_NAME["adamw"].ours([param])
        saved = optimizer.state_dict()
        saved["state"][0] = {"step": 1, "exp_avg": values, "exp_avg_sq": values**2}
        optimizer.load_state_dict(saved)
        assert optimizer.state[param]["exp_avg"].stride() == param.stride()
        param.grad = values
        optimizer.step()
        ends.append(param.detach())
    assert torch.equal(*ends)


def test_masters_in_a_checkpoint_for_wider_parameters_are_dropped():
    """Guards a BF16 checkpoint loaded into an FP32 model: its weights count."""
    half, wide = make_params(torch.bfloat16), make_params(torch.float32)
    optimizer, other = BY_NAME["adamw"].ours(half), BY_NAME["adamw"].ours(wide)
    train(optimizer, half, range(1))
    other.load_state_dict(optimizer.state_dict())
    assert "master" not in other.state[wide[0]]
    train(other, wide, range(1))


def test_master_weights_of_the_present_optimizer_count():
    """Guards the choice of storage: a checkpoint doesn't switch masters on or off."""
    params = make_params(torch.bfloat16)
    optimizer, other = (BY_NAME["adamw"].ours(params, master_weights=mode) for mode in ("fp32", "none"))
    train(optimizer, params, range(1))
    saved = optimizer.state_dict()
    other.load_state_dict(saved)
    assert other.param_groups[0]["master_weights"] == "none"
    assert "master" not in other.state[params[0]]
    assert "master" in saved["state"][0]


def test_unknown_state_is_kept():
    """Guards users who keep entries of their own in optimizer.state: copied, not cast."""
    params = make_params(torch.bfloat16, [(3,)])
    optimizer = BY_NAME["sgd"].ours(params)
    saved = optimizer.state_dict()
    saved["state"][0] = {"trust": torch.ones(2, dtype=torch.float64), "note": ["a", {"b": torch.ones(1)}]}
    saved["state"]["global"] = 3
    optimizer.load_state_dict(saved)
    state = optimizer.state[params[0]]
    assert state["trust"].dtype == torch.float64
    assert state["trust"].data_ptr() != saved["state"][0]["trust"].data_ptr()
    assert state["note"] == ["a", {"b": torch.ones(1)}]
    assert optimizer.state["global"] == 3


def test_load_hooks_see_the_right_state():
    """Guards hooks: pre-hooks may replace the dict, post-hooks find finished FP32 states; each runs once."""
    params = make_params(torch.bfloat16, [(3,)])
    optimizer = BY_NAME["adamw"].ours(params)
    train(optimizer, params, range(1))
    saved, seen = optimizer.state_dict(), []

    def before(optimizer, state_dict):
        seen.append(type(state_dict["state"][0]["exp_avg"]))
        entry = {**state_dict["state"][0], "exp_avg": torch.full((3,), 0.1)}
        return {**state_dict, "state": {0: entry}}

    def after(optimizer):
        seen.append(optimizer.state[params[0]]["exp_avg"].clone())

    optimizer.register_load_state_dict_pre_hook(before)
    optimizer.register_load_state_dict_post_hook(after, prepend=True)
    optimizer.load_state_dict(saved)
    assert seen[0] is torch.Tensor
    assert torch.equal(seen[1], torch.full((3,), 0.1))
    assert len(seen) == 2
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == 1
    assert len(optimizer._optimizer_load_state_dict_post_hooks) == 1


BAD_STATES = {
    "shape": (
        {"step": 1, "exp_avg": torch.ones(5), "exp_avg_sq": torch.ones(3)},
        r"'exp_avg' of shape \[5\]",
    ),
    "type": (
        {"step": 1, "exp_avg": [1.0], "exp_avg_sq": torch.ones(3)},
        "'exp_avg' of type list; expected a tensor",
    ),
    "missing": ({"step": 1, "exp_avg": torch.ones(3)}, r"without \['exp_avg_sq'\]; expected all of"),
    "master": (
        {"step": 1, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3), "master": torch.ones(2)},
        r"'master' of shape \[2\].*expected \[3\]",
    ),
}


@pytest.mark.parametrize("name", BAD_STATES)
def test_state_that_does_not_fit_is_refused_whole(name):
    """Guards the errors: they name the state, and nothing was loaded, neither state nor groups."""
    entry, message = BAD_STATES[name]
    params = make_params(torch.bfloat16, [(3,), (3,)])
    optimizer = BY_NAME["adamw"].ours(params, lr=0.5)
    train(optimizer, params, range(1))
    saved = copy.deepcopy(optimizer.state_dict())
    before = pickle.dumps(optimizer.state_dict())
    saved["state"][1] = entry
    saved["param_groups"][0]["lr"] = 7.0
    with pytest.raises(
        (ValueError, TypeError), match=rf"\[AdamW.load_state_dict\] state\[1\] has .*{message}"
    ):
        optimizer.load_state_dict(saved)
    assert pickle.dumps(optimizer.state_dict()) == before
    assert not optimizer._optimizer_load_state_dict_pre_hooks


def test_other_bad_checkpoints():
    """Guards the errors for groups and whole dicts."""
    params = make_params(torch.float32, [(3,), (3,)])
    optimizer = BY_NAME["adamw"].ours(params)
    saved = optimizer.state_dict()
    group = saved["param_groups"][0]
    with pytest.raises(ValueError, match=r"got a dict with keys.*expected 'state' and 'param_groups'"):
        optimizer.load_state_dict({"model": 1})
    with pytest.raises(ValueError, match="different number of parameter groups"):
        optimizer.load_state_dict({"state": {}, "param_groups": [group, group]})
    with pytest.raises(ValueError, match="doesn't match the size"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{**group, "params": [0]}]})
    with pytest.raises(ValueError, match=r"\[AdamW.load_state_dict\] group 0: lr is -1"):
        optimizer.load_state_dict({"state": {}, "param_groups": [{**group, "lr": -1}]})


@pytest.mark.parametrize(
    "way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"]
)
@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_copies_go_on_bitwise(case, way):
    """Guards deepcopy and pickle, before the first step and after it; the copy is independent."""
    for steps in (0, 2):
        params = mixed()
        optimizer = case.ours(params, **case.options)
        train(optimizer, params, range(steps))
        other = way(optimizer)
        copied = [p for group in other.param_groups for p in group["params"]]
        assert not {id(p) for p in copied} & {id(p) for p in params}
        assert other._fusedamp_fused
        assert other._amp is None
        train(optimizer, params, range(steps, steps + 2))
        train(other, copied, range(steps, steps + 2))
        assert_same_state(optimizer, other, params, copied)


def test_setstate_completes_old_groups():
    """Guards pickles of older versions: missing group keys get the defaults."""
    optimizer = BY_NAME["adamw"].ours(make_params(torch.float32, [(3,)]), master_weights="none")
    state = optimizer.__getstate__()
    del state["param_groups"][0]["amsgrad"], state["param_groups"][0]["master_weights"]
    state["param_groups"][0]["decoupled_weight_decay"] = False
    other = BY_NAME["adamw"].ours.__new__(BY_NAME["adamw"].ours)
    other.__setstate__(state)
    group = other.param_groups[0]
    assert (group["amsgrad"], group["master_weights"], group["decoupled_weight_decay"]) == (
        False,
        "none",
        True,
    )


@pytest.mark.parametrize("how", ["entry", "tensor", "clear", "replaced"])
def test_state_exchanged_between_steps(how):
    """Guards caches between steps: replaced states are used, cleared ones are recreated."""
    param = torch.nn.Parameter(torch.ones(4, dtype=torch.bfloat16))
    optimizer = BY_NAME["sgd"].ours([param], lr=1.0, momentum=0.5)
    param.grad = torch.ones_like(param)
    optimizer.step()
    optimizer.step()
    buffer = torch.full((4,), 8.0)
    if how == "entry":
        optimizer.state[param] = {**optimizer.state[param], "momentum_buffer": buffer}
    elif how == "tensor":
        optimizer.state[param]["momentum_buffer"] = buffer.to(torch.bfloat16)  # FP32 again after the step
    elif how == "clear":
        optimizer.state.clear()
    else:
        optimizer.state = type(optimizer.state)(dict)
    optimizer.step()
    expected = 5.0 if how in ("entry", "tensor") else 1.0
    assert torch.equal(optimizer.state[param]["momentum_buffer"], torch.full((4,), expected))
    assert optimizer.state[param]["step"] == (3 if expected == 5 else 1)
