"""Whose complaint an error is: the op's own become ValueErrors with their cause, others stay as they are."""

import pytest
import torch
from fusedamp import ops
from fusedamp.ops import checks
from fusedamp.ops.declaration import step_op
from fusedamp.ops.inputs import DeviceInputs
from fusedamp.ops.table import StepTable
from fusedamp.tensors import addresses
from op_calls import scalar

NADAM = ("betas[0]", "betas[1]", "eps", "weight_decay", "decoupled_weight_decay", "momentum_decay")


def sgd(**options):
    return ops.sgd_([torch.ones(3)], [torch.ones(3)], [], [], [scalar(0.0)], **(dict(lr=0.1) | options))


def test_own_complaints_are_value_errors_with_their_cause():
    with pytest.raises(ValueError, match=r"^\[sgd_\] found_inf is float64") as caught:
        sgd(found_inf=scalar(0.0, torch.float64))
    assert isinstance(caught.value.__cause__, RuntimeError)
    assert "[sgd_] found_inf is float64" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    "text",
    [
        "CUDA error: an illegal memory access was encountered [sgd_] params[0]",
        "CUDA out of memory. [GPU 0] has 2 GiB",
        "[adamw_] params[3] is int64",
        "[enforce fail at alloc_cpu.cpp:117] . DefaultCPUAllocator: can't allocate memory",
    ],
)
def test_errors_of_others_stay_runtime_errors(monkeypatch, text):
    error = RuntimeError(text)

    def fails(*args, **kwargs):
        raise error

    fails.default, fails._schema = fails, torch.ops.fusedamp.sgd_.default._schema
    monkeypatch.setattr(torch.ops.fusedamp, "sgd_", fails)
    with pytest.raises(RuntimeError) as caught:
        sgd()
    assert caught.value is error
    assert checks.complaint("sgd_", error) is None


def test_steps_from_addresses_complain_alike():
    params, grads, steps = [torch.ones(3)], [torch.ones(3)], [scalar(0.0)]
    hyper = dict(momentum=0.0, dampening=0.0, weight_decay=0.0, nesterov=0.0)
    scalars = ops.step_scalars("sgd_", params[0].device, 0.1, hyper)
    table = StepTable([ops.StepCall("sgd_", params, grads, [], {}, steps, scalars)])
    with pytest.raises(ValueError, match=r"^\[sgd_\] found_inf is float64") as caught:
        table.step(params, DeviceInputs(found_inf=scalar(0.0, torch.float64)))
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_ops_that_take_addresses_are_private():
    names = [name for name in dir(ops) if not name.startswith("_")]
    assert not [name for name in names if "packed" in name]
    for name in ("planned_step_", "packed_grad_stats"):
        assert not hasattr(torch.ops.fusedamp, name)
        assert hasattr(torch.ops.fusedamp, f"_{name}")
    with pytest.raises(TypeError, match="unexpected keyword argument"):
        ops.grad_stats([torch.ones(3)], fields=addresses.read([torch.ones(3)]))


def test_hyper_parameters_have_the_names_and_the_order_of_the_op():
    for hyper in (dict(weight_decay=0.0), dict(dampening=0.0, momentum=0.0, weight_decay=0.0, nesterov=0.0)):
        with pytest.raises(
            TypeError, match=r"^\[sgd_\] hyper-parameters are .*; expected \['momentum', 'damp"
        ):
            ops.step_scalars("sgd_", None, 0.1, hyper)
    scalars = ops.step_scalars("nadam_", None, 0.1, dict.fromkeys(NADAM, 0.5))
    assert scalars["hyper"] == [0.5, 0.5, 0.5, 0.5, 0.5, 0.96**0.5]
    assert ops.options_of("nadam_") == ("betas", *NADAM[2:])


def test_a_declaration_with_other_hyper_parameters_is_refused():
    """Guards against an op and its wrapper that have come apart."""

    def lion_(params, grads, exp_avgs, masters, steps, *, lr, betas, decay): ...

    with pytest.raises(
        ImportError, match=r"^\[lion_\] is declared with .*'decay'.*; expected .*'weight_decay'"
    ):
        step_op("Lion", "", "", "")(lion_)


def test_wrong_arguments_are_named_by_python():
    lists = [[]] * 5
    for given, options, text in (
        (lists, {}, r"sgd_\(\) missing 1 required keyword-only argument: 'lr'"),
        (lists, dict(lr=0.1, decay=0.1), r"sgd_\(\) got unexpected keyword arguments \['decay'\]"),
        (lists, dict(lr=0.1, params=[]), r"sgd_\(\) got multiple values for argument 'params'"),
        ([*lists, []], dict(lr=0.1), r"sgd_\(\) takes 5 positional arguments but 6"),
    ):
        with pytest.raises(TypeError, match=text):
            ops.sgd_(*given, **options)
    assert ops.sgd_.__name__ == ops.sgd_.__qualname__ == "sgd_"
