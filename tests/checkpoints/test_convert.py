"""Checkpoints in the layouts of other libraries: after conversion training continues as it would there."""

import pytest
import torch
from cases import make_params
from foreign_layouts import (
    OPTIONS,
    SHAPES,
    advance,
    apex,
    bnb,
    deepspeed,
    group_of,
    half,
    optimi,
    reference,
    te,
    te_joined,
    te_split,
    torchao,
)
from fusedamp import optim
from fusedamp.checkpoints import convert

HALVES = (torch.float16, torch.bfloat16)


def loaded(saved, source, params, fp32_weights=None, **options):
    """Convert without changing anything, and load."""
    optimizer = optim.AdamW(params, lr=1.0, **options)
    before, kept = str(saved), [p.detach().clone() for p in params]
    converted = convert(saved, optimizer, source, fp32_weights)
    assert before == str(saved)
    assert all(torch.equal(p, k) for p, k in zip(params, kept, strict=True))
    assert not optimizer.state
    optimizer.load_state_dict(converted)
    assert {k: optimizer.param_groups[0][k] for k in OPTIONS} == OPTIONS
    return optimizer


def assert_continues(params, optimizer, dtype, masters):
    """One further step gives the bits of the FP32 run, in masters (or FP32 weights) and states."""
    theirs, exact = reference(dtype)
    advance(theirs, exact, range(4, 5), dtype)
    advance(params, optimizer, range(4, 5))
    for p, q in zip(params, theirs, strict=True):
        entry = optimizer.state[p]
        assert entry["step"] == 5
        assert torch.equal(entry["exp_avg"], exact.state[q]["exp_avg"])
        assert torch.equal(entry["exp_avg_sq"], exact.state[q]["exp_avg_sq"])
        assert torch.equal(masters(p, entry), q)


def test_apex():
    params, optimizer = reference()
    saved, mine = apex(params, optimizer), half(params, torch.float32)
    assert_continues(mine, loaded(saved, "apex", mine), torch.float32, lambda p, entry: p)


@pytest.mark.parametrize("source", ["apex", "te", "deepspeed"])
def test_masters_that_the_user_added(source):
    params, optimizer = reference(torch.bfloat16)
    saved, mine = apex(params, optimizer), half(params, torch.bfloat16)
    for entry, p in zip(saved["state"].values(), params, strict=True):
        entry["master"] = p.detach().clone()
    ours = loaded(saved, source, mine)
    assert_continues(mine, ours, torch.bfloat16, lambda p, entry: entry["master"])


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_apex_with_fp32_weights(dtype):
    """Guards O2: Apex's masters are in no optimizer checkpoint, the model's FP32 weights are."""
    params, optimizer = reference(dtype)
    mine = half(params, dtype)
    ours = loaded(apex(params, optimizer), "apex", mine, fp32_weights=params)
    assert_continues(mine, ours, dtype, lambda p, entry: entry["master"])


@pytest.mark.parametrize("master_weights", ["fp32", "split"])
@pytest.mark.parametrize("remainders", [False, True])
def test_te(remainders, master_weights):
    """Guards TE's masters in both forms, into both of ours, bit for bit."""
    params, optimizer = reference(torch.bfloat16)
    mine = [torch.nn.Parameter(te_split(p.detach())[0]) for p in params]
    if not remainders:
        mine = half(params, torch.bfloat16)
    saved = te(params, optimizer, remainders)
    ours = loaded(saved, "te", mine, master_weights=master_weights)

    def joined(p, entry):
        is_split = master_weights == "split"
        return te_joined(p.detach(), entry["master"].bits) if is_split else entry["master"]

    assert_continues(mine, ours, torch.bfloat16, joined)


def test_te_remainders_are_split_masters():
    """Guards the claim for random bits: TE's remainder is loaded unchanged, and joined to the same value."""
    bits = torch.randint(-(2**31), 2**31 - 1, (50_000,), generator=torch.Generator().manual_seed(0))
    master = bits.to(torch.int32).view(torch.float32)
    master = master[master.abs() < 3e38]
    weight, low = te_split(master)
    param = torch.nn.Parameter(weight)
    zeros = torch.zeros_like(master)
    entry = {"exp_avg": zeros, "exp_avg_sq": zeros, "master_param": low}
    group = {"params": [0], "lr": 0.0, "weight_decay": 0.0, "bias_correction": True, "step": 1}
    optimizer = optim.AdamW([param], master_weights="split")
    optimizer.load_state_dict(convert({"state": {0: entry}, "param_groups": [group]}, optimizer, "te"))
    param.grad = torch.zeros_like(param)
    optimizer.step()
    assert torch.equal(param.view(torch.int16), weight.view(torch.int16))
    assert torch.equal(optimizer.state[param]["master"].bits, low)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_deepspeed_flat(dtype):
    params, optimizer = reference(dtype)
    mine = half(params, dtype)
    ours = loaded(deepspeed(params, optimizer), "deepspeed", mine)
    assert_continues(mine, ours, dtype, lambda p, entry: entry["master"])


def test_deepspeed_cpu_adam_as_it_is():
    params, optimizer = reference()
    saved, mine = apex(params, optimizer), half(params, torch.float32)
    for entry in saved["state"].values():
        entry["step"] = 4
    assert_continues(mine, loaded(saved, "deepspeed", mine), torch.float32, lambda p, entry: p)


@pytest.mark.parametrize("nested", [False, True])
def test_bitsandbytes_32_bit(nested):
    params, optimizer = reference()
    saved, mine = bnb(params, optimizer, nested), half(params, torch.float32)
    assert_continues(mine, loaded(saved, "bitsandbytes", mine), torch.float32, lambda p, entry: p)


@pytest.mark.parametrize("numel", [1, 256, 257, 300, 1025])
def test_bitsandbytes_8_bit(numel):
    """Guards the blocks: each element is its map's value times the scale of its block of 256."""
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(256, (numel, 1), generator=generator, dtype=torch.uint8)
    blocks = -(-numel // 256)
    entry = {"step": 3}
    for n in (1, 2):
        entry[f"state{n}"] = codes
        entry[f"qmap{n}"] = torch.linspace(-1 if n == 1 else 0, 1, 256)
        entry[f"absmax{n}"] = torch.arange(1.0, blocks + 1) * n
    param = torch.nn.Parameter(torch.zeros(numel, 1))
    optimizer = optim.AdamW([param])
    saved = {"state": {0: entry}, "param_groups": [group_of(1)]}
    optimizer.load_state_dict(convert(saved, optimizer, "bitsandbytes"))
    for n, name in ((1, "exp_avg"), (2, "exp_avg_sq")):
        values = [
            entry[f"qmap{n}"][int(code)] * entry[f"absmax{n}"][i // 256] for i, code in enumerate(codes)
        ]
        assert torch.equal(optimizer.state[param][name], torch.stack(values).view(numel, 1))


def test_bitsandbytes_lion():
    params = make_params(torch.float32, SHAPES)
    lion = optim.Lion(params, lr=1e-2)
    advance(params, lion, range(3))
    entries = {i: {"step": 3, "state1": lion.state[p]["exp_avg"].clone()} for i, p in enumerate(params)}
    group = dict(lr=1e-2, betas=(0.9, 0.99), eps=0.0, weight_decay=0, params=list(range(len(params))))
    mine = half(params, torch.float32)
    ours = optim.Lion(mine, lr=1.0)
    ours.load_state_dict(convert({"state": entries, "param_groups": [group]}, ours, "bitsandbytes"))
    advance(params, lion, range(3, 5))
    advance(mine, ours, range(3, 5))
    assert all(torch.equal(p, q) for p, q in zip(mine, params, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_optimi(dtype):
    """Guards the factor of the bias correction, and the masters: what the error in 16 bits tells of them."""
    params, optimizer = reference()
    mine = half(params, dtype)
    ours = loaded(optimi(params, optimizer, dtype), "optimi", mine)
    for p, q in zip(mine, params, strict=True):
        entry, exact = ours.state[p], optimizer.state[q]
        assert entry["step"] == 4
        torch.testing.assert_close(entry["exp_avg"], exact["exp_avg"], rtol=1e-6, atol=0)
        torch.testing.assert_close(entry["exp_avg_sq"], exact["exp_avg_sq"], rtol=1e-6, atol=0)
        if dtype != torch.float32:  # the weight's error is 2^-9 of it, in 8 bits more
            torch.testing.assert_close(entry["master"], q.detach(), rtol=2**-17, atol=0)


def test_torchao():
    params, optimizer = reference()
    mine = half(params, torch.float32)
    ours = loaded(torchao(params, optimizer), "torchao", mine)
    assert_continues(mine, ours, torch.float32, lambda p, entry: p)
