"""Step ops refuse wrong arguments: the error names op, list, index, what it got and wanted, and the way
out."""

import op_refusals
import pytest
import torch
from op_calls import HALVES, scalar, step_call
from op_refusals import NO_DATA, bad_type, bad_value, freed, meta, option, pop, put, with_gaps
from torch import Tensor


def all_meta(call):
    vars(call).update(vars(call.map(meta)))


def overlap(call):
    buffer = torch.zeros(12)
    call.params[0], call.params[2] = buffer[:6].view(2, 3), buffer[5:11].view(2, 3)


def twice(name, at, source):
    return lambda call: put(name, at, lambda t: call.lists()[source][1])(call)


def give(name, value):
    return lambda call: setattr(call, name, value)


ADAM = {
    "meta": bad_value(put("grads", 1, meta), "grads[1]", NO_DATA),
    "all meta": bad_value(all_meta, "params[0]", NO_DATA),
    "meta state": bad_value(put("exp_avgs", 2, meta), "exp_avgs[2]", NO_DATA),
    "freed": bad_value(put("params", 1, freed), "params[1] (shape [2, 3]) has no memory", "freed?"),
    "sparse": bad_value(put("grads", 2, Tensor.to_sparse), "grads[2] is sparse", ".to_dense()"),
    "complex": bad_value(
        put("grads", 0, lambda t: t + 0j), "grads[0] is ComplexFloat; expected", "view_as_real"
    ),
    "integers": bad_value(
        put("params", 1, Tensor.int),
        "params[1] is int32; expected float16, bfloat16, float32 or float64. Cast",
    ),
    "shape": bad_value(
        put("grads", 1, Tensor.flatten), "grads[1] has shape [6]; expected [2, 3], like params[1]"
    ),
    "state shape": bad_value(
        put("exp_avg_sqs", 1, lambda t: t[:1]), "exp_avg_sqs[1] has shape [1, 3]; expected [2, 3]"
    ),
    "strides": bad_value(
        put("exp_avgs", 1, lambda t: t.t().contiguous().t()),
        "exp_avgs[1] has strides [1, 2]; expected [3, 1], like params[1] (shape [2, 3])",
        "torch.empty_like(param)",
    ),
    "gaps": bad_value(
        put("params", 1, with_gaps),
        "params[1] (shape [2, 3], strides [6, 2]) has gaps or overlaps",
        ".contiguous()",
    ),
    "expanded": bad_value(
        put("grads", 0, lambda t: t[:, :1].expand(2, 3)),
        "grads[0] (shape [2, 3], strides [3, 0]) has gaps or overlaps in memory; expected a dense tensor",
    ),
    "float64 gradient": bad_value(
        put("grads", 2, Tensor.double),
        "grads[2] is float64; expected at most float32, because params[2] is float32. Cast",
    ),
    "float16 state": bad_value(
        put("exp_avg_sqs", 0, Tensor.half),
        "exp_avg_sqs[0] is float16; expected float32, bfloat16, or uint8 with scales, because params[0] is",
    ),
    "float64 state": bad_value(
        put("exp_avgs", 0, Tensor.double),
        "exp_avgs[0] is float64; expected float32, bfloat16, or int8 with scales, because params[0]",
    ),
    "integer step": bad_value(
        put("steps", 1, Tensor.int), "steps[1] is int32 of shape []; expected one float32 element"
    ),
    "long step": bad_value(
        put("steps", 1, lambda t: t.repeat(2)), "steps[1] is float32 of shape [2]; expected one float32"
    ),
    "no gradient": bad_type(put("grads", 1, lambda t: None), "grads[1] is None; expected a tensor"),
    "no tensor": bad_type(put("params", 0, lambda t: 3.0), "params[0] is a float; expected a tensor"),
    "few grads": bad_value(pop("grads"), "grads has 2 tensors; expected 3, one per param"),
    "few steps": bad_value(pop("steps"), "steps has 2 tensors; expected 3, one per param"),
    "few states": bad_value(pop("exp_avg_sqs"), "exp_avg_sqs has 2 tensors; expected 3, one per param"),
    "no params": bad_value(give("params", []), "grads has 3 tensors; expected 0"),
    "same weight": bad_value(
        twice("params", 2, "params"),
        "params[2] (shape [2, 3]) shares memory with params[1]; expected memory of its own",
        "clone()",
    ),
    "same step": bad_value(twice("steps", 2, "steps"), "steps[2] (shape []) shares memory with steps[1]"),
    "same state": bad_value(twice("exp_avg_sqs", 1, "exp_avgs"), "[1]", "shares memory with exp_avg"),
    "overlapping": bad_value(overlap, "params[2] (shape [2, 3]) shares memory with params[0]"),
    "weight is gradient": bad_value(
        twice("grads", 1, "params"), "params[1] (shape [2, 3]) shares memory with grads[1]"
    ),
    "None": bad_type(give("grads", None), "grads is None; expected a list of tensors"),
    "one tensor": bad_type(give("steps", torch.zeros(3)), "steps is a Tensor; expected a list of tensors"),
    "lr": bad_type(option(lr="fast"), "lr is 'fast'; expected a number"),
    "long lr": bad_value(
        option(lr=torch.ones(2)), "lr is float32 of shape [2]; expected one float32 or float64 element"
    ),
    "integer lr": bad_value(option(lr=torch.ones((), dtype=torch.int64)), "lr is int64"),
    "float16 lr": bad_value(option(lr=scalar(1.0, torch.float16)), "lr is float16 of shape []; expected one"),
    "betas": bad_type(option(betas=0.9), "betas is 0.9; expected 2 numbers"),
    "eps": bad_type(option(eps=None), "eps is None; expected a number"),
    "amsgrad": bad_value(option(amsgrad=True), "max_exp_avg_sqs has 0 tensors with amsgrad=True; expected"),
    "found_inf": bad_type(option(found_inf=1.0), "found_inf is a float; expected a tensor"),
    "float64 found_inf": bad_value(
        option(found_inf=scalar(0.0, torch.float64)), "found_inf is float64 of shape []; expected one float32"
    ),
    "long inv_scale": bad_value(
        option(inv_scale=torch.ones(3)), "inv_scale is float32 of shape [3]; expected one float32 element"
    ),
    "bool clip_coef": bad_value(
        option(clip_coef=torch.tensor(True)), "clip_coef is Bool of shape []; expected one float32 element"
    ),
    "empty inv_scale": bad_value(option(inv_scale=torch.ones(0)), "inv_scale is float32 of shape [0]"),
    "sparse inv_scale": bad_value(option(inv_scale=torch.ones(1).to_sparse()), "inv_scale is sparse"),
    "meta clip_coef": bad_value(option(clip_coef=torch.ones(1, device="meta")), "clip_coef is " + NO_DATA),
}


@pytest.mark.parametrize("op", ["adamw", "adam"])
@pytest.mark.parametrize("name", ADAM)
def test_adam_ops(name, op):
    call = step_call(op, [(2, 3)] * 3, torch.float32)
    tensors = call.tensors()
    ADAM[name].change(call)
    op_refusals.check(call.run, tensors, f"{op}_", ADAM[name])


SGD = {
    "no buffers": bad_value(pop("momentum_buffers"), "momentum_buffers has 0 tensors with momentum=0.9; exp"),
    "useless buffers": bad_value(
        option(momentum=0.0), "momentum_buffers has 1 tensors with momentum=0.0; expected", "none without"
    ),
    "buffer dtype": bad_value(
        put("momentum_buffers", 0, Tensor.half), "momentum_buffers[0] is float16; expected float32"
    ),
    "momentum": bad_type(option(momentum="big"), "momentum is 'big'; expected a number"),
}


@pytest.mark.parametrize("name", SGD)
def test_sgd(name):
    call = step_call("sgd-momentum", [(2, 3)], torch.float32)
    tensors = call.tensors()
    SGD[name].change(call)
    op_refusals.check(call.run, tensors, "sgd_", SGD[name])


SCALARS = {
    "float32": bad_value(
        put("mu_products", 1, Tensor.float), "mu_products[1] is float32 of shape []; expected one float64"
    ),
    "long": bad_value(
        put("mu_products", 0, lambda t: t.repeat(2)), "mu_products[0] is float64 of shape [2]; expected one"
    ),
    "few": bad_value(pop("mu_products"), "mu_products has 1 tensors; expected 2, one per param"),
    "same": bad_value(
        put("mu_products", 0, lambda t: t), "mu_products[1] (shape []) shares memory with mu_products[0]"
    ),
}


@pytest.mark.parametrize("name", SCALARS)
def test_scalars(name):
    call = step_call("nadam", [(4,), (4,)], torch.float32)
    tensors = call.tensors()
    SCALARS[name].change(call)
    if name == "same":
        call.states[2][1] = call.states[2][0]
    op_refusals.check(call.run, tensors, "nadam_", SCALARS[name])


MASTERS = {
    "float64": bad_value(put("masters", 1, Tensor.double), "masters[1] is float64; expected float32"),
    "some": bad_value(pop("masters"), "masters has 1 tensors; expected 2, one per param, or none at all"),
    "float32 weight": bad_value(
        put("params", 0, Tensor.float),
        "params[0] is float32 and has a master; expected float16 or bfloat16",
        "without masters",
    ),
    "shape": bad_value(put("masters", 0, lambda t: t[:1]), "masters[0] has shape [1]; expected [4]"),
    "same": bad_value(twice("masters", 0, "masters"), "masters[", "shares memory with masters["),
}


@pytest.mark.parametrize("name", MASTERS)
def test_masters(name):
    call = step_call("adamw", [(4,), (4,)], HALVES, masters=True)
    tensors = call.tensors()
    MASTERS[name].change(call)
    op_refusals.check(call.run, tensors, "adamw_", MASTERS[name])
