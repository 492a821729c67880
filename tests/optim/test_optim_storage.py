"""Optimizers in every storage mode: runs repeat and resume bit for bit, checkpoints convert, the rest is
refused.
"""

import copy
import io
import itertools

import pytest
import torch
from cases import BY_NAME, SHAPES, kept, make_params, nonnegative_states, set_grads
from fusedamp import GradScaler, optim
from fusedamp.ops import recode
from on_device import DEVICE
from storage_reference import rounded_away

HALVES = (torch.float16, torch.bfloat16)
STATES = ("float32", "bfloat16", "int8")
SOME = [
    BY_NAME[name] for name in ("adamw", "adam-amsgrad", "sgd-nesterov", "lion", "adagrad", "rmsprop-momentum")
]
MODES = [
    dict(master_weights=master, state_dtype=state, stochastic_rounding=random, rounding_seed=7)
    for master, state, random in itertools.product(("fp32", "split", "none"), STATES, (False, True))
    if (master == "none" or not random) and (master, state) != ("fp32", "float32")
]


def name(mode):
    return f"{mode['master_weights']}-{mode['state_dtype']}{'-random' * mode['stochastic_rounding']}"


def run(optimizer, params, steps):
    for step in steps:
        set_grads(params, step)
        optimizer.step()


def tensors(optimizer, params):
    return [
        *params,
        *(value for param in params for _, value in sorted(kept(optimizer.state[param]).items())),
    ]


def same(one, other):
    return all(
        a.dtype == b.dtype
        and torch.equal(a.detach().view(-1).view(torch.uint8), b.detach().view(-1).view(torch.uint8))
        for a, b in zip(one, other, strict=True)
    )


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
def test_runs_resume_bit_for_bit(case, dtype, mode):
    """A checkpoint in the middle changes nothing; nor does how the op is called (replayed, or checked)."""
    params, resumed = make_params(dtype), make_params(dtype)
    optimizer = case.ours(params, **case.options, **mode)
    run(optimizer, params, range(6))
    first = case.ours(resumed, **case.options, **mode)
    run(first, resumed, range(3))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = case.ours(resumed, **case.options, **mode)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(second, resumed, range(3, 6))
    assert same(tensors(optimizer, params), tensors(second, resumed))
    kinds = {value.dtype for value in kept(optimizer.state[params[0]]).values()}
    wanted = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}
    signed = [state for state in case.states if state not in nonnegative_states(case.ours)]
    assert wanted[mode["state_dtype"]] in kinds or not signed
    assert (torch.int16 in kinds) == (mode["master_weights"] == "split" and dtype in HALVES)


@pytest.mark.parametrize("case", SOME, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_split_masters_are_the_masters(case, dtype):
    """Bitwise the same FP32 masters as unsplit ones, and weights are rounded masters."""
    whole, halves = make_params(dtype), make_params(dtype)
    optimizer, split = (
        case.ours(whole, **case.options),
        case.ours(halves, **case.options, master_weights="split"),
    )
    for step in range(5):
        run(optimizer, whole, [step])
        run(split, halves, [step])
        for one, other in zip(whole, halves, strict=True):
            master = recode.master_of(other.detach(), split.state[other]["master"].bits)
            if dtype == torch.bfloat16:
                assert torch.equal(master, optimizer.state[one]["master"])
            else:  # of subnormal halves it is a multiple of 2^-39
                off = (master - optimizer.state[one]["master"]).abs()
                assert (off <= torch.where(master.abs() < 2.0**-16, (step + 1) * 2.0**-39, 0.0)).all()
            rounded = rounded_away(master) if dtype == torch.bfloat16 else master.to(dtype)
            assert torch.equal(other.detach(), rounded)


@pytest.mark.parametrize("mode", MODES, ids=name)
def test_a_skipped_step_changes_no_bit(mode):
    """Weights, masters, quantized values, scales and step counts are unchanged if the scaler finds an
    overflow."""
    params = make_params(torch.bfloat16)
    optimizer, scaler = optim.AdamW(params, **mode), GradScaler(DEVICE, init_scale=4.0)
    scaler.scale(torch.zeros(1))
    run(optimizer, params, range(2))
    before = [t.clone() for t in tensors(optimizer, params)]
    set_grads(params, 2)
    params[3].grad.view(-1)[0] = float("inf")
    scaler.step(optimizer)
    assert same(before, tensors(optimizer, params))


@pytest.mark.parametrize("mode", MODES, ids=name)
@pytest.mark.parametrize("other", MODES, ids=name)
def test_checkpoints_convert(mode, other):
    """From every mode to every other: masters exactly, states as near as the format is."""
    params, copies = make_params(torch.bfloat16), make_params(torch.bfloat16)
    source = optim.AdamW(params, lr=1e-2, **mode)
    run(source, params, range(3))
    target = optim.AdamW(copies, lr=0.0, weight_decay=0.0, **other)
    target.load_state_dict(copy.deepcopy(source.state_dict()))
    for group in target.param_groups:
        group.update(lr=0.0, weight_decay=0.0)
        assert name(group) == name(other)
    with torch.no_grad():  # the model's checkpoint is loaded after the optimizer's
        for one, weight in zip(copies, params, strict=True):
            one.copy_(weight)
    run(target, copies, [3])
    for one, weight in zip(copies, params, strict=True):
        if "none" not in (mode["master_weights"], other["master_weights"]):
            found, wanted = (
                entry["master"]
                if entry["master"].dtype == torch.float32
                else recode.master_of(p.detach(), entry["master"].bits)
                for p, entry in ((one, target.state[one]), (weight, source.state[weight]))
            )
            assert torch.equal(found, wanted)
        assert target.state[one]["step"] == 4


def test_fp32_checkpoints_become_compressed_and_return():
    """FP32 to split and 8 bits and back: masters bit for bit, moments within half a quantization step."""
    params, copies, again = (make_params(torch.bfloat16) for _ in range(3))
    source = optim.AdamW(params, lr=1e-2)
    run(source, params, range(3))
    small = optim.AdamW(copies, master_weights="split", state_dtype="int8")
    with torch.no_grad():
        for one, two, weight in zip(copies, again, params, strict=True):
            one.copy_(weight)
            two.copy_(weight)
    small.load_state_dict(copy.deepcopy(source.state_dict()))
    assert small.state[copies[3]]["exp_avg_sq"].bits.dtype == torch.uint8
    back = optim.AdamW(again)
    back.load_state_dict(copy.deepcopy(small.state_dict()))
    for two, weight in zip(again, params, strict=True):
        assert torch.equal(back.state[two]["master"], source.state[weight]["master"])
        for moment in ("exp_avg", "exp_avg_sq"):
            found, wanted = back.state[two][moment], source.state[weight][moment]
            assert found.dtype == torch.float32
            largest = wanted.abs().max() if wanted.numel() else 0.0
            assert ((found - wanted).abs() <= wanted.abs() / 8 + largest * 2.0**-16).all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("written", [0.0, -0.0, 1.0, 0.3, 60000.0])
def test_a_written_weight_stays_within_half_a_unit(dtype, written):
    """Guards split masters: steps start from a modified weight, for any remainder."""
    param = torch.nn.Parameter(torch.randn(4096).to(dtype))
    optimizer = optim.SGD([param], lr=1e-3, master_weights="split")
    param.grad = torch.randn(4096).to(dtype)
    optimizer.step()
    param.data.fill_(written)
    param.grad.zero_()
    optimizer.step()
    assert torch.equal(param.detach(), torch.full_like(param, written))


def test_seeds_and_places_draw_apart():
    """Another rounding_seed, or another place in the optimizer, and other random numbers."""

    def codes(seed=0, before=0):
        params = [torch.nn.Parameter(torch.zeros(4096)) for _ in range(before + 1)]
        for param in params:
            param.grad = torch.full_like(param, 1.03)
        groups = [{"params": params, "rounding_seed": seed}]
        optimizer = optim.SGD(groups, momentum=0.9, state_dtype=torch.bfloat16)
        optimizer.step()
        return optimizer.state[params[-1]]["momentum_buffer"]

    assert torch.equal(codes(), codes())
    assert not torch.equal(codes(), codes(seed=1))
    assert not torch.equal(codes(), codes(before=1))


REFUSED = {
    "state_dtype": (
        dict(state_dtype=torch.float16),
        torch.float32,
        "state_dtype is 'float16'; expected one of",
    ),
    "masters": (
        dict(stochastic_rounding=True),
        torch.bfloat16,
        "a weight with a master is rounded to nearest",
    ),
    "float64": (
        dict(state_dtype="int8"),
        torch.float64,
        r"is float64 .* expected float16, bfloat16 or float32",
    ),
    "complex": (dict(state_dtype=torch.bfloat16), torch.complex64, r"is complex64 .* group of its own"),
    "complex32": (dict(master_weights="split"), torch.complex32, "expected a real parameter"),
}


@pytest.mark.parametrize("why", REFUSED)
def test_what_cannot_be_is_refused(why):
    options, dtype, message = REFUSED[why]
    param = torch.nn.Parameter(torch.zeros(3, dtype=dtype))
    param.grad = torch.zeros_like(param)
    with pytest.raises(ValueError, match=message):
        optim.AdamW([param], **options).step()


@pytest.mark.parametrize("make", [optim.Adafactor, optim.Muon])
def test_steps_made_of_torch_operations_refuse_compression(make):
    with pytest.raises((TypeError, ValueError), match=r"state_dtype|master_weights"):
        make([torch.nn.Parameter(torch.zeros(3, 3).bfloat16())], master_weights="split")


def test_centered_rmsprop_refuses_compressed_states():
    with pytest.raises(ValueError, match="difference of two rounded states"):
        optim.RMSprop([torch.nn.Parameter(torch.zeros(3))], centered=True, state_dtype="int8")


def test_memory_is_what_was_promised():
    """Split and int8: 2 + 2 + 1 + 1 bytes per parameter and the scales, nothing else."""
    param = torch.nn.Parameter(torch.zeros(128 * 100, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    optimizer = optim.AdamW([param], master_weights="split", state_dtype="int8")
    optimizer.step()
    held = sum(value.untyped_storage().nbytes() for value in kept(optimizer.state[param]).values())
    assert held == param.numel() * 4 + 2 * 4 * 100 + 4
    assert len(SHAPES) > 3


def test_8_bit_states_follow_the_parameters_layout():
    """Blocks of scales are neighbors in memory: other layouts have blocks and scales of their own."""
    torch.manual_seed(0)
    start, grad = torch.randn(3, 40, 5, 6), torch.logspace(-3, 3, 3600).view(3, 40, 5, 6)

    def make(layout):
        param = torch.nn.Parameter(start.to(memory_format=layout))
        optimizer = optim.AdamW([param], lr=1e-2, state_dtype="int8")
        param.grad = grad.to(memory_format=layout)
        return param, optimizer

    source, saved = make(torch.contiguous_format)
    saved.step()
    target, loaded = make(torch.channels_last)
    loaded.load_state_dict(saved.state_dict())
    wide = optim.AdamW([target])
    wide.load_state_dict(loaded.state_dict())
    expected = optim.AdamW([source])
    expected.load_state_dict(saved.state_dict())
    for name in ("exp_avg", "exp_avg_sq"):
        ours, wanted = wide.state[target][name], expected.state[source][name]
        # Quantized again, to the nearest of 16 or 32 values per octave, in the upper 4 octaves of a block.
        block = wanted.to(memory_format=torch.channels_last).permute(0, 2, 3, 1).reshape(-1)
        largest = torch.nn.functional.pad(block, (0, -block.numel() % 128)).view(-1, 128).abs().amax(1)
        largest = largest.repeat_interleave(128)[: block.numel()].view(3, 5, 6, 40).permute(0, 3, 1, 2)
        upper = wanted.abs() > largest / 16
        torch.testing.assert_close(ours[upper], wanted[upper], rtol=1 / 16, atol=0)
