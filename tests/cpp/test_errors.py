"""Options and parameters that can't be used: the message of C++ is Python's, and nothing has changed."""

import pytest
import torch
from cpp_twin import params, random, same

HALF = torch.float16
NAN, INF = float("nan"), float("inf")

# Class and options of the constructor, and of a group.
OPTIONS = [
    *(("AdamW", dict(lr=lr)) for lr in (-1.0, -1e-30, NAN, INF, 1e39, -0.5)),
    *(("SGD", dict(weight_decay=value)) for value in (-1.0, NAN, INF, 3.5e38, -1e16, -123456789.0, -1e-7)),
    *(("Adam", dict(betas=betas)) for betas in ((1.0, 0.5), (0.5, 1.0), (-0.1, 0.5), (0.5, NAN), (0.5, INF))),
    *(
        (name, dict(eps=-1.0))
        for name in ("Adam", "Adagrad", "RMSprop", "RAdam", "NAdam", "LAMB", "LARS", "NovoGrad")
    ),
    *((name, dict(betas=(0.5, 1.5))) for name in ("AdamW", "Lion", "RAdam", "NAdam", "LAMB", "NovoGrad")),
    *((name, dict(momentum=-0.5)) for name in ("SGD", "RMSprop", "LARS")),
    *(("SGD", dict(momentum=0.5, dampening=value)) for value in (NAN, INF, -INF, -1e39)),
    *(
        ("SGD", dict(nesterov=True, **more))
        for more in (dict(momentum=0.0, dampening=0.0), dict(momentum=0.5, dampening=0.25))
    ),
    *(("RMSprop", dict(alpha=value)) for value in (-1.0, NAN, INF)),
    *(("RMSprop", dict(centered=True, state_dtype=value)) for value in ("int8", "bfloat16")),
    *(("Adagrad", {name: -1.0}) for name in ("lr_decay", "initial_accumulator_value")),
    ("NAdam", dict(momentum_decay=-1.0)),
    ("LARS", dict(trust_coefficient=-1.0)),
    *(("LAMB", dict(trust_clip=value)) for value in (-1.0, NAN, -INF, 1e39)),
    *(("AdamW", dict(master_weights=value)) for value in ("half", "", "FP32", "int8")),
    *(("AdamW", dict(state_dtype=value)) for value in ("float16", "", "uint8")),
    *(("AdamW", dict(stochastic_rounding=True, master_weights=value)) for value in ("auto", "fp32", "split")),
    *(("AdamW", dict(rounding_seed=value)) for value in (-1, -(2**31))),
    *(
        ("AdamW", dict(lr=lr))
        for lr in (torch.ones(2), torch.ones(1, 1, 2), torch.tensor(True), torch.empty(0))
    ),
    *(("AdamW", dict(lr=lr)) for lr in (torch.tensor(-1.0), torch.tensor(NAN))),
]


@pytest.mark.parametrize(("kind", "options"), OPTIONS, ids=str)
def test_options(kind, options, program):
    """Of the constructor, of a group, of a group that is added, and of one that is changed before a step."""
    make = ["optimizer", "o", kind, [[["p0"], None]]]
    commands = [*params([(3,), (4,)], HALF), [*make, options]]
    commands += [["optimizer", "o", kind, [[["p0"], None], [["p1"], options]], {}]]
    commands += [[*make, {}], ["add_group", "o", [["p1"], options]]]
    if not isinstance(options.get("lr"), torch.Tensor):
        commands += [["options", "o", 0, options]]
        commands += [["grads", {"p0": random((3,), HALF, 1)}], ["step", "o"], ["weights", ["p0", "p1"]]]
    seen = same(program, commands)
    errors = [text for text in seen if isinstance(text, str)]
    assert len(errors) == 3 + (not isinstance(options.get("lr"), torch.Tensor))


def test_a_learning_rate_in_whole_numbers(program):
    """No op reads it."""
    make = ["optimizer", "o", "AdamW", [[["p0"], None]], dict(lr=torch.tensor(2))]
    commands = [*params([(3,)], HALF), make, ["grads", {"p0": random((3,), HALF, 1)}], ["step", "o"]]
    seen = same(program, [*commands, ["weights", ["p0"]]])
    assert "ValueError: [adamw_] lr is int64" in seen[0]


@pytest.mark.parametrize(
    "value",
    [torch.ones(3, dtype=torch.int32), torch.ones(3, dtype=torch.bool), torch.ones(2, 2, dtype=torch.uint8)],
    ids=lambda t: str(t.dtype),
)
def test_parameters_of_other_dtypes(value, program):
    commands = [["param", "p0", value], ["optimizer", "o", "AdamW", [[["p0"], None]], {}]]
    same(program, [*commands, ["grads", {"p0": value}], ["step", "o"]])


ODD = {
    "expanded": torch.ones(3, 1).expand(3, 4),
    "sliding": torch.ones(9).as_strided((4, 3), (2, 1)),
    "one element that is expanded": torch.ones(1).expand(1, 1),
}


@pytest.mark.parametrize("name", ODD)
def test_parameters_whose_elements_share_memory(name, program):
    commands = [["param_view", "p0", ODD[name]], ["optimizer", "o", "AdamW", [[["p0"], None]], {}]]
    same(program, [*commands, ["grads", {"p0": torch.ones(ODD[name].shape)}], ["step", "o"]])


def test_parameters_on_other_devices(program):
    """A meta tensor has no memory."""
    commands = [["meta", "p0"], ["optimizer", "o", "AdamW", [[["p0"], None]], {}]]
    same(program, [*commands, ["step", "o"]])


def test_a_parameter_without_storage(program):
    """As FSDP leaves it."""
    commands = [*params([(3,)], HALF), ["optimizer", "o", "AdamW", [[["p0"], None]], {}]]
    commands += [["grads", {"p0": random((3,), HALF, 1)}], ["no_storage", "p0"], ["step", "o"]]
    same(program, commands)


def test_parameters_that_are_given_twice(program):
    commands = params([(3,), (4,)], HALF)
    for groups in ([[["p0", "p0"], None]], [[["p0"], None], [["p1", "p0"], None]]):
        commands += [["optimizer", "o", "AdamW", groups, {}]]
    seen = same(program, commands)
    assert len(seen) == 2


@pytest.mark.parametrize(
    "mode", [dict(state_dtype="int8"), dict(state_dtype="bfloat16"), dict(master_weights="split")], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.complex64, torch.complex128], ids=str)
def test_formats_that_a_dtype_does_not_have(dtype, mode, program):
    """In a second group; the first has not been stepped either."""
    groups = [[["p0"], None], [["p1"], mode]]
    commands = [*params([(3,)], HALF), *params([(4,)], dtype, 1), ["optimizer", "o", "Adam", groups, {}]]
    commands += [["grads", {"p0": random((3,), HALF, 1), "p1": random((4,), dtype, 2)}], ["step", "o"]]
    same(program, [*commands, ["weights", ["p0", "p1"]]])
