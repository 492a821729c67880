"""Checkpoints with 8-bit states and split masters: edits that torch's states allow are correct or raise by
name, and what stores, copies or reorders tensors changes nothing.
"""

import copy
import io

import pytest
import torch
from cases import kept, make_params, set_grads
from fusedamp import optim
from fusedamp.optim.state.encoded import Quantized, Remainder, Scales
from test_optim_encoded import DTYPES, INT8, adamw


def set_to(name, change):
    return lambda entry: entry.update({name: change(entry[name])})


SAVED = {
    "all to float": (
        lambda e: e.update({k: v.float() for k, v in e.items() if isinstance(v, torch.Tensor)}),
        "block scales of an 8-bit state, beside 'exp_avg' of dtype torch.float32",
    ),
    "values averaged": (set_to("exp_avg", lambda v: v.float().mean(0, keepdim=True)), "block scales"),
    "scales averaged": (
        set_to("exp_avg_scale", lambda s: (s + 4 * s.clamp(min=1e-3)) / 2),
        "'exp_avg_scale' that are no powers of two",
    ),
    "scales cast": (set_to("exp_avg_scale", torch.Tensor.half), "with block scales torch.float16"),
    "cast without scales": (
        lambda e: [set_to("exp_avg", torch.Tensor.float)(e), e.pop("exp_avg_scale"), e.pop("exp_avg_numel")],
        "has state 'exp_avg' of dtype torch.float32, which was saved in 8 bits",
    ),
    "scales lost": (lambda e: e.pop("exp_avg_scale"), "with block scales None"),
    "too few scales": (set_to("exp_avg_scale", lambda s: s[:0]), r"expected torch.float32 of shape \[3\]"),
    "pruned": (set_to("exp_avg", lambda v: v[:-1]), r"of 256 elements with block scales .* shape \[3\]"),
    "appended": (
        set_to("exp_avg", lambda v: torch.cat((v, v[:1]))),
        "of 258 elements, which was saved with 257",
    ),
    "wrong sign": (set_to("exp_avg", lambda v: v.to(torch.uint8)), "expected torch.int8"),
    "remainder cast": (set_to("master", torch.Tensor.float), "saved as the remainder of a split one"),
    "remainder pruned": (
        set_to("master", lambda m: m[:-1]),
        r"has a master of dtype torch.uint8 and shape \[256, 2\]",
    ),
    "master of flags": (set_to("master", torch.Tensor.bool), "has a master of dtype torch.bool"),
    "count NaN": (lambda e: e.update(step=torch.tensor(float("nan"))), "has step count nan"),
    "count negative": (lambda e: e.update(step=-1), "has step count -1"),
    "count broken": (lambda e: e.update(step=torch.tensor(1.5)), "has step count 1.5"),
    "count too large": (lambda e: e.update(step=1e30), r"has step count 1e\+30"),
    "count of several": (lambda e: e.update(step=torch.ones(2)), "has a step count of shape"),
}


@pytest.mark.parametrize(("edit", "text"), SAVED.values(), ids=SAVED)
@pytest.mark.parametrize("target", ["int8", "float32"])
def test_edited_checkpoints_are_refused(edit, text, target):
    _params, optimizer = adamw()
    saved = copy.deepcopy(optimizer.state_dict())
    edit(saved["state"][6])  # of 257 elements, in three blocks
    other = optim.AdamW(make_params(torch.bfloat16), state_dtype=target, master_weights="split")
    with pytest.raises(ValueError, match=r"^\[AdamW.load_state_dict\] state\[6\] .*" + text):
        other.load_state_dict(saved)
    assert not other.state


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
def test_distributed_checkpoints_load_into_their_own_format(target, tmp_path):
    """torch.distributed.checkpoint casts quantized values to the dtype of the states that it loads into."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    def trained(**options):
        torch.manual_seed(0)
        net = torch.nn.Linear(9, 7).bfloat16()
        optimizer = optim.AdamW(net.parameters(), **options)
        for p in net.parameters():
            p.grad = torch.randn_like(p)
        optimizer.step()
        return net, optimizer

    def load(net, optimizer):
        saved = get_optimizer_state_dict(net, optimizer)
        dcp.load(saved, checkpoint_id=tmp_path)
        set_optimizer_state_dict(net, optimizer, saved)

    source, eight = trained(state_dtype="int8"), trained(state_dtype="int8", lr=0.1)
    dcp.save(get_optimizer_state_dict(*source), checkpoint_id=tmp_path)
    with pytest.raises(ValueError, match="which was saved in 8 bits; expected its int8"):
        load(*trained(state_dtype=target))
    load(*eight)
    net, other = trained(state_dtype=target)
    other.load_state_dict(eight[1].state_dict())
    for p, q in zip(net.parameters(), source[0].parameters(), strict=True):
        for name in ("exp_avg", "exp_avg_sq"):
            wanted = source[1].state[q][name].dequantize()
            assert torch.equal(other.state[p][name], wanted.to(other.state[p][name].dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_checkpoints_hold_plain_tensors_and_values(dtype):
    params, optimizer = adamw(dtype)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for entry in saved["state"].values():
        tensors = [v for v in entry.values() if isinstance(v, torch.Tensor)]
        assert {type(t) for t in tensors} == {torch.Tensor}
        assert entry["exp_avg"].dtype == torch.int8
        assert entry["exp_avg_sq"].dtype == torch.uint8
        assert entry["exp_avg_numel"] == entry["exp_avg"].numel()
    entry = optimizer.state[params[1]]
    assert isinstance(entry["exp_avg"], Quantized)
    assert isinstance(entry["exp_avg_scale"], Scales)
    assert isinstance(entry.get("master"), Remainder) == (dtype != torch.float32)
    assert saved["state"][1].keys() == entry.keys()  # torch's code indexes one with the keys of the other


def test_what_was_removed_is_not_saved():
    """A state that was removed to start over leaves nothing that breaks a load."""
    params, _optimizer = adamw()
    state = optim.SGD(params, lr=0.1, momentum=0.9, **INT8)
    set_grads(params, 0)
    state.step()
    del state.state[params[1]]["momentum_buffer"]
    saved = copy.deepcopy(state.state_dict())
    assert saved["state"][1].keys() == {"step", "master"}
    state.load_state_dict(saved)


def test_an_order_that_is_none_is_refused():
    _params, optimizer = adamw()
    saved = copy.deepcopy(optimizer.state_dict())
    saved["state"][3]["exp_avg_order"] = 64 * 64 + 64 + 1
    with pytest.raises(ValueError, match=r"with the order \[1, 1\] of dimensions; expected each once"):
        optimizer.load_state_dict(saved)


def test_pickles_of_bare_values_are_taken_over():
    """An optimizer pickled before 8-bit states were tensor subclasses continues bit for bit."""
    params, optimizer = adamw()
    old = copy.deepcopy(optimizer)
    state = old.__getstate__()
    for entry in state["state"].values():
        entry.update({name: value for name, value in kept(entry).items()})
        for name in [name for name in entry if name.endswith("_numel")]:
            del entry[name]
    twin = object.__new__(optim.AdamW)
    twin.__setstate__(state)
    copies = twin.param_groups[0]["params"]
    for some, one in ((params, optimizer), (copies, twin)):
        set_grads(some, 3)
        one.step()
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


LAYOUTS = [torch.contiguous_format, torch.channels_last]
ROUND_TRIPS = {
    "as it is": lambda t: t,
    "contiguous": torch.Tensor.contiguous,
    "clone": lambda t: t.clone(memory_format=torch.contiguous_format),
    "numpy": lambda t: torch.from_numpy(t.numpy().copy()),
}


@pytest.mark.parametrize("trip", ROUND_TRIPS.values(), ids=ROUND_TRIPS)
@pytest.mark.parametrize("source", LAYOUTS, ids=str)
@pytest.mark.parametrize("target", LAYOUTS, ids=str)
def test_checkpoints_know_the_order_in_memory(source, target, trip):
    """Block scales belong to it; containers that store contiguous tensors must not mix them up."""
    grad = torch.logspace(0, -6, 2048).view(2, 64, 4, 4)

    def made(layout):
        param = torch.nn.Parameter(torch.zeros(2, 64, 4, 4).to(memory_format=layout))
        optimizer = optim.SGD([param], lr=1.0, momentum=0.9, **INT8)
        param.grad = grad.to(memory_format=layout)
        optimizer.step()
        return param, optimizer

    _, saver = made(source)
    param, loader = made(target)
    saved = copy.deepcopy(saver.state_dict())
    entry = saved["state"][0]
    entry.update({name: trip(value) for name, value in entry.items() if isinstance(value, torch.Tensor)})
    loader.load_state_dict(saved)
    found = loader.state[param]["momentum_buffer"].float()
    exact = saver.state[saver.param_groups[0]["params"][0]]["momentum_buffer"].float()
    if source is target:
        assert torch.equal(found, exact)
    else:  # coded once more, in other blocks: within two of the 8 values that an octave has at least here
        largest = 2.0**-9
        torch.testing.assert_close(found, exact, rtol=1 / 4, atol=largest)
