"""Step ops refuse wrong scales, seeds and formats of masters and states, in words, before any change."""

import op_refusals
import pytest
import torch
from fusedamp.ops import recode
from op_calls import HALVES, STATE_NAMES, step_call
from op_refusals import NO_DATA, bad_type, bad_value, freed, meta, option, pop, put
from torch import Tensor

CODES = {"exp_avgs": torch.int8, "exp_avg_sqs": torch.uint8, "momentum_buffers": torch.int8}


def in_8_bits(variant, shapes, **options):
    """A call with quantized states and their scales."""
    call = step_call(variant, shapes, torch.float32, **options)
    scales = []
    for name, states in zip(STATE_NAMES[call.op], call.states, strict=True):
        if states and states[0].dtype == torch.float32:
            coded = [recode.quantized(state, CODES[name]) for state in states]
            states[:] = [codes for codes, _ in coded]
            scales += [scale for _, scale in coded]
    call.options.update(scales=scales, seeds=list(range(len(shapes))))
    return call


def scale(index, new):
    """Changes a call: scales[index] becomes new(scales[index])."""

    def change(call):
        call.options["scales"][index] = new(call.options["scales"][index])

    return change


def without_scales(call):
    del call.options["scales"]


def same_scales(call):
    call.options["scales"][2] = call.options["scales"][0]


def scales_are_state(call):
    call.states[0][0] = torch.zeros(304, dtype=torch.int8)[:300]
    call.options["scales"][0] = call.states[0][0][:12].view(torch.float32)


def in_float32(call):
    for states in call.states[:2]:
        states[0] = states[0].float()


def wrong_sign(dtype):
    return lambda state: state.to(dtype)


SCALES = {
    "no list": bad_type(option(scales=torch.ones(3)), "scales is a Tensor; expected a list of tensors"),
    "None": bad_type(option(scales=None), "scales is None; expected a list of tensors"),
    "None in it": bad_type(scale(1, lambda t: None), "scales[1] is None; expected a tensor"),
    "number in it": bad_type(scale(2, lambda t: 1.0), "scales[2] is a float; expected a tensor"),
    "one": bad_value(
        option(scales=[torch.ones(3)]), "scales has 1 tensors; expected one per 8-bit state, or"
    ),
    "too many": bad_value(
        option(scales=[torch.ones(3) for _ in range(6)]), "scales has 6 tensors; expected one per 8-bit state"
    ),
    "missing": bad_value(
        without_scales,
        "exp_avgs[0] is int8 without scales; expected one float32 for each 128 of its elements. Pass scales",
    ),
    "of one list": bad_value(
        lambda call: call.options["scales"].__delitem__(slice(2, 4)),
        "exp_avg_sqs[0] is uint8 without scales; expected one float32 for each 128",
    ),
    "float16": bad_value(
        scale(1, Tensor.half),
        "scales[1] is float16 of shape [1]; expected contiguous float32 [1], one for each",
    ),
    "few": bad_value(
        scale(2, lambda t: t[:1].clone()),
        "scales[2] is float32 of shape [1]; expected contiguous float32 [3], one for each 128 elements of",
    ),
    "many": bad_value(
        scale(0, lambda t: t.repeat(2)), "scales[0] is float32 of shape [6]; expected contiguous float32 [3]"
    ),
    "gaps": bad_value(
        scale(0, lambda t: t.repeat(2)[::2]), "scales[0] is float32 of shape [3]; expected contiguous float32"
    ),
    "meta": bad_value(scale(3, meta), "scales[3]", NO_DATA),
    "freed": bad_value(scale(0, freed), "scales[0] (shape [3]) has no memory", "freed?"),
    "sparse": bad_value(scale(0, Tensor.to_sparse), "scales[0] is sparse", ".to_dense()"),
    "same": bad_value(same_scales, "scales[2] (shape [3]) shares memory with scales[0]"),
    "inside of a state": bad_value(scales_are_state, "scales[0] (shape [3]) shares memory with exp_avgs[0]"),
    "signed values": bad_value(
        put("exp_avg_sqs", 1, wrong_sign(torch.int8)),
        "exp_avg_sqs[1] is int8; expected float32, bfloat16, or uint8 with scales, because params[1]",
    ),
    "unsigned values": bad_value(
        put("exp_avgs", 0, wrong_sign(torch.uint8)),
        "exp_avgs[0] is uint8; expected float32, bfloat16, or int8 with scales, because params[0]",
    ),
    "FP32 states": bad_value(
        in_float32,
        "scales[0] has shape [3]; expected none, or an empty tensor, as exp_avgs[0] is float32. Pass scales",
    ),
    "mixed formats": bad_value(
        put("exp_avg_sqs", 1, Tensor.bfloat16),
        "exp_avg_sqs[1] is bfloat16 beside exp_avgs[1], which is int8; expected one storage format for all",
        "states of params[1]",
    ),
}
SEEDS = {
    "number": bad_type(
        option(seeds=3), "seeds is 3; expected a list of whole numbers from -2**63 to 2**63 - 1"
    ),
    "None": bad_type(option(seeds=None), "seeds is None; expected a list of whole numbers"),
    "text": bad_type(option(seeds="12"), "seeds is '12'; expected a list of whole numbers"),
    "tensor": bad_type(
        option(seeds=torch.tensor([1, 2], device="cpu")), "seeds is tensor([1, 2]); expected a list of whole"
    ),
    "float in it": bad_type(option(seeds=[1, 2.0]), "seeds[1] is 2.0; expected a whole number from -2**63"),
    "bool in it": bad_type(option(seeds=[True, 2]), "seeds[0] is True; expected a whole number"),
    "few": bad_value(option(seeds=[1]), "seeds has 1 numbers; expected 2, one per param, or none at all"),
    "many": bad_value(option(seeds=[1, 2, 3]), "seeds has 3 numbers; expected 2, one per param"),
    "huge": bad_value(
        option(seeds=[0, 2**63]), "seeds[1] is 9223372036854775808; expected a whole number from"
    ),
    "low": bad_value(option(seeds=[-(2**63) - 1, 0]), "seeds[0] is -9223372036854775809; expected a whole"),
    "random": bad_type(
        option(stochastic_rounding="no"), "stochastic_rounding is 'no'; expected True or False"
    ),
}


BOTH = [*(pytest.param(r, id=f"scales, {name}") for name, r in SCALES.items())]
BOTH += [*(pytest.param(r, id=f"seeds, {name}") for name, r in SEEDS.items())]


@pytest.mark.parametrize("op", ["adamw", "adam"])
@pytest.mark.parametrize("refusal", BOTH)
def test_scales_and_seeds(refusal, op):
    call = in_8_bits(op, [(300,), (5,)])
    tensors = [*call.tensors(), *call.options["scales"]]
    refusal.change(call)
    op_refusals.check(call.run, tensors, f"{op}_", refusal)


@pytest.mark.parametrize("variant", ["novograd", "nadam"])
def test_scalars_have_no_scales(variant):
    """Guards the count: the FP64 scalars of a tensor are not 8-bit states."""
    call = in_8_bits(variant, [(300,), (5,)])
    call.run()
    extra = [torch.ones(3), torch.ones(1)]
    call.options["scales"] += extra
    count = len(call.options["scales"])
    tensors = [*call.tensors(), *call.options["scales"]]
    refusal = bad_value(None, f"scales has {count} tensors; expected one per 8-bit state, or none at all")
    op_refusals.check(call.run, tensors, f"{variant}_", refusal)


def test_formats_may_differ_between_parameters():
    """A parameter with FP32 states and one with quantized states: the former has empty scales."""
    mixed = in_8_bits("adamw", [(300,), (300,)])
    wide = step_call("adamw", [(300,), (300,)], torch.float32)
    for states, exact in zip(mixed.states[:2], wide.states[:2], strict=True):
        states[0] = exact[0].clone()
    mixed.options["scales"][::2] = [torch.empty(0), torch.empty(0)]
    for call in (mixed, wide):
        call.run()
    assert torch.equal(mixed.params[0], wide.params[0])
    assert mixed.states[1][1].dtype == torch.uint8


def test_seeds_reach_their_parameters():
    """Any 64-bit number, negative ones too; by default a parameter's index."""
    ends = []
    for seeds in ([0, 1], [], [-(2**63), 2**63 - 1], [1, 0]):
        call = in_8_bits("sgd-momentum", [(4000,), (4000,)])
        call.options["seeds"] = seeds
        call.run()
        ends.append(torch.cat(call.states[0]))
    assert torch.equal(ends[0], ends[1])
    assert all((ends[0] != other).any() for other in ends[2:])


MASTERS = {
    "int32": bad_value(
        put("masters", 1, Tensor.int),
        "masters[1] is int32; expected float32, or int16 for a split master, because params[1] is bfloat16",
    ),
    "bfloat16": bad_value(
        put("masters", 0, Tensor.bfloat16), "masters[0] is bfloat16; expected float32, or int16 for a split"
    ),
    "few": bad_value(pop("masters"), "masters has 1 tensors; expected 2, one per param, or none at all"),
    "shape": bad_value(put("masters", 1, lambda t: t[:2]), "masters[1] has shape [2]; expected [4], like"),
}


@pytest.mark.parametrize("name", MASTERS)
def test_split_masters(name):
    call = step_call("adamw", [(4,), (4,)], HALVES, masters=True)
    call.masters[:] = [torch.zeros(4, dtype=torch.int16) for _ in range(2)]
    tensors = call.tensors()
    MASTERS[name].change(call)
    op_refusals.check(call.run, tensors, "adamw_", MASTERS[name])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.uint8])
def test_wide_parameters_keep_wide_states(dtype):
    """FP64 weights have no other states."""
    call = step_call("sgd-momentum", [(4,)], torch.float64)
    call.states[0][0] = call.states[0][0].to(dtype)
    kind = "bfloat16" if dtype == torch.bfloat16 else "uint8"
    refusal = bad_value(
        None, f"momentum_buffers[0] is {kind}; expected float64, because params[0] is float64"
    )
    op_refusals.check(call.run, call.tensors(), "sgd_", refusal)
