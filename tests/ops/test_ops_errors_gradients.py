"""unscale_, grad_stats and update_scale_ refuse wrong arguments, in words, and change nothing."""

import op_refusals
import pytest
import torch
from fusedamp import ops
from op_calls import scalar
from op_refusals import NO_DATA, bad_type, bad_value, freed, meta, with_gaps
from torch import Tensor

GRADIENTS = {
    "meta": bad_value(meta, "is " + NO_DATA),
    "freed": bad_value(freed, "(shape [2, 3]) has no memory; expected allocated storage. Was it freed?"),
    "sparse": bad_value(Tensor.to_sparse, "is sparse (torch.sparse_coo); expected a strided tensor", "dense"),
    "csr": bad_value(Tensor.to_sparse_csr, "is sparse (torch.sparse_csr); expected a strided tensor"),
    "complex": bad_value(lambda g: g + 0j, "is ComplexFloat; expected float16, bfloat16, float32 or float64"),
    "integers": bad_value(Tensor.long, "is int64; expected float16, bfloat16, float32 or float64. Cast it"),
    "bool": bad_value(Tensor.bool, "is Bool; expected float16, bfloat16, float32 or float64"),
    "float8": bad_value(lambda g: g.to(torch.float8_e4m3fn), "is Float8_e4m3fn; expected float16"),
    "gaps": bad_value(with_gaps, "(shape [2, 3], strides [6, 2]) has gaps or overlaps in memory"),
    "expanded": bad_value(
        lambda g: g[:1].expand(2, 3), "(shape [2, 3], strides [0, 1]) has gaps or overlaps"
    ),
    "None": bad_type(lambda g: None, "is None; expected a tensor"),
    "number": bad_type(lambda g: 1.0, "is a float; expected a tensor"),
    "list": bad_type(lambda g: [g], "is a list; expected a tensor"),
}


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("name", GRADIENTS)
@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_gradients(name, place):
    """The bad one first, and among others."""
    grads = [torch.randn(2, 3) for _ in range(3)]
    tensors, found_inf = list(grads), torch.zeros(())
    grads[place] = GRADIENTS[name].change(grads[place])
    refusal = GRADIENTS[name]._replace(texts=(f"grads[{place}] ", *GRADIENTS[name].texts))
    op_refusals.check(
        lambda: ops.unscale_(grads, scalar(0.5), found_inf), [*tensors, found_inf], "unscale_", refusal
    )
    op_refusals.check(lambda: ops.grad_stats(grads, scalar(0.5)), tensors, "grad_stats", refusal)


def test_unscale_multiplies_no_memory_twice():
    grads = [torch.ones(5), torch.ones(3)]
    grads.append(grads[0][2:4])
    refusal = bad_value(None, "grads[2] (shape [2]) shares memory with grads[0]", "clone()")
    op_refusals.check(lambda: ops.unscale_(grads, scalar(0.5), torch.zeros(())), grads, "unscale_", refusal)
    assert ops.grad_stats(grads).total == 10.0  # reading it twice is allowed


LISTS = {
    "None": bad_type(None, "grads is None; expected a list of tensors"),
    "tensor": bad_type(torch.ones(3), "grads is a Tensor; expected a list of tensors"),
    "generator": bad_type((g for g in [torch.ones(3)]), "grads is a generator; expected a list of tensors"),
    "dict": bad_type({"g": torch.ones(3)}, "grads is a dict; expected a list of tensors"),
}


@pytest.mark.parametrize("name", LISTS)
def test_what_is_no_list(name):
    grads = LISTS[name].change
    found_inf = torch.zeros(())
    op_refusals.check(lambda: ops.unscale_(grads, scalar(1.0), found_inf), [], "unscale_", LISTS[name])
    op_refusals.check(lambda: ops.grad_stats(grads), [], "grad_stats", LISTS[name])


INV_SCALE = {
    "long": bad_value(torch.ones(2), "inv_scale is float32 of shape [2]; expected one float32 element"),
    "float16": bad_value(
        scalar(1.0, torch.float16), "inv_scale is float16 of shape []; expected one float32"
    ),
    "number": bad_type(0.5, "inv_scale is a float; expected a tensor"),
    "meta": bad_value(torch.ones((), device="meta"), "inv_scale is " + NO_DATA),
}


@pytest.mark.parametrize("name", INV_SCALE)
def test_inv_scale(name):
    bad, found_inf, grads = INV_SCALE[name].change, torch.zeros(()), [torch.ones(3)]
    op_refusals.check(lambda: ops.unscale_(grads, bad, found_inf), grads, "unscale_", INV_SCALE[name])
    op_refusals.check(lambda: ops.grad_stats(grads, bad), grads, "grad_stats", INV_SCALE[name])


FOUND_INF = {
    "None": bad_type(None, "found_inf is None; expected a tensor"),
    "long": bad_value(torch.zeros(2), "found_inf is float32 of shape [2]; expected one float32 element"),
    "int": bad_value(
        torch.zeros((), dtype=torch.int32), "found_inf is int32 of shape []; expected one float32"
    ),
}


@pytest.mark.parametrize("name", FOUND_INF)
def test_found_inf(name):
    grads, found_inf = [torch.ones(3)], FOUND_INF[name].change
    op_refusals.check(lambda: ops.unscale_(grads, scalar(0.5), found_inf), grads, "unscale_", FOUND_INF[name])


NORM_TYPE = {
    "negative": bad_value(-1.0, "norm_type is -1.0; expected a number from 0 to inf"),
    "nan": bad_value(float("nan"), "norm_type is nan; expected a number from 0 to inf"),
    "text": bad_type("two", "norm_type is 'two'; expected a number"),
    "None": bad_type(None, "norm_type is None; expected a number"),
}


@pytest.mark.parametrize("name", NORM_TYPE)
def test_norm_type(name):
    grads, norm_type = [torch.ones(3)], NORM_TYPE[name].change
    op_refusals.check(lambda: ops.grad_stats(grads, None, norm_type), grads, "grad_stats", NORM_TYPE[name])


def test_grad_stats_of_nothing():
    refusal = bad_value(None, "grads is empty; expected at least one tensor")
    op_refusals.check(lambda: ops.grad_stats([]), [], "grad_stats", refusal)


SCALE = {
    "scale": bad_value(dict(scale=torch.ones(2)), "scale is float32 of shape [2]; expected one float32"),
    "scale dtype": bad_value(dict(scale=scalar(1.0, torch.float64)), "scale is float64 of shape []"),
    "scale kind": bad_type(dict(scale=1.0), "scale is a float; expected a tensor"),
    "tracker dtype": bad_value(
        dict(growth_tracker=scalar(0.0)), "growth_tracker is float32 of shape []; expected one int32 element"
    ),
    "tracker kind": bad_type(dict(growth_tracker=0), "growth_tracker is a int; expected a tensor"),
    "found_inf": bad_value(dict(found_inf=torch.zeros(0)), "found_inf is float32 of shape [0]; expected one"),
    "found_inf meta": bad_value(dict(found_inf=torch.zeros((), device="meta")), "found_inf is " + NO_DATA),
    "growth_factor": bad_type(dict(growth_factor=None), "growth_factor is None; expected a number"),
    "max_scale": bad_type(dict(max_scale="high"), "max_scale is 'high'; expected a number"),
    "growth_interval": bad_value(
        dict(growth_interval=2.5), "growth_interval is 2.5; expected a whole number"
    ),
    "hysteresis": bad_value(dict(hysteresis=0), "hysteresis is 0; expected a whole number from 1"),
    "no budget": bad_value(dict(hysteresis=2), "hysteresis is 2; expected a hysteresis_tracker (int32, 1"),
    "budget dtype": bad_value(
        dict(hysteresis=2, hysteresis_tracker=scalar(2.0)),
        "hysteresis_tracker is float32 of shape []; expected one int32 element",
    ),
}


@pytest.mark.parametrize("name", SCALE)
def test_update_scale(name):
    tracker = torch.zeros((), dtype=torch.int32)
    tensors = dict(scale=scalar(8.0), growth_tracker=tracker, found_inf=scalar(1.0))
    arguments = tensors | dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=3) | SCALE[name].change
    op_refusals.check(lambda: ops.update_scale_(**arguments), tensors.values(), "update_scale_", SCALE[name])
