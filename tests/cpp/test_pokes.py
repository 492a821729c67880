"""What other code does to parameters, gradients, groups and states between two steps: the next one sees it.

It takes it as in Python, or refuses it in the same words and writes nothing.
"""

import pytest
import torch
from cases import BY_NAME
from cpp_twin import grads, params, random, same

HALF = torch.float16
SHAPES = [(3, 5), (130,), (), (4, 2)]
NAMES = [f"p{i}" for i in range(len(SHAPES))]
FORMATS = {
    "FP32": {},
    "split, int8": dict(master_weights="split", state_dtype="int8", rounding_seed=3),
    "BF16": dict(master_weights="none", state_dtype="bfloat16", rounding_seed=3),
}


def make(case, groups=None, **options):
    groups = groups or [[NAMES[:2], None], [NAMES[2:], None]]
    return ["optimizer", "o", BY_NAME[case].ours.__name__, groups, {**BY_NAME[case].options, **options}]


def steps(first, count, names=NAMES, skip=()):
    """Commands of ``count`` steps; gradients belong to parameters by name, and ``skip`` have none."""
    commands = []
    for step in range(first, first + count):
        given = grads(SHAPES, HALF, step)
        given |= {name: random((2, 3), HALF, 50 + step) for name in names if name not in given}
        commands += [["grads", {name: given[name] for name in names if name not in skip}], ["step", "o"]]
        commands += [["look", "o", list(names)]]
    return commands


# Each is done after three steps, when the tables of a step are kept, and is followed by three more.
POKES = {
    "nothing": [],
    "weight written": [["write", "p0", random((3, 5), HALF, 70)]],
    "weight moved": [["set_data", "p0", random((3, 5), HALF, 71)]],
    "0-dim weight moved": [["set_data", "p2", random((), HALF, 72)]],
    "weight of another dtype": [
        ["set_data", "p1", random((130,), torch.float32, 73)],
        ["grads", {"p1": None}],
    ],
    "another order of memory": [["set_data", "p0", random((5, 3), HALF, 74).t()]],
    "states erased": [["erase_state", "o", "p1"]],
    "all states erased": [["clear_state", "o"]],
    "state written": [["write_state", "o", "p0", "exp_avg", torch.ones(3, 5)]],
    "count written": [["write_state", "o", "p1", "step", torch.tensor(7.0)]],
    "master written": [["write_state", "o", "p1", "master", torch.ones(130)]],
    "state moved": [["set_state_data", "o", "p1", "exp_avg", torch.ones(130)]],
    "count moved": [["set_state_data", "o", "p3", "step", torch.tensor(2.0)]],
    "count in FP64": [["set_state_data", "o", "p3", "step", torch.tensor(2.0, dtype=torch.float64)]],
    "count of one element": [["set_state_data", "o", "p3", "step", torch.tensor([2.0])]],
    "two counts": [["set_state_data", "o", "p3", "step", torch.zeros(2)]],
    "state of another dtype": [["set_state_data", "o", "p1", "exp_avg_sq", torch.ones(130, dtype=HALF)]],
    "state of whole numbers": [
        ["set_state_data", "o", "p1", "exp_avg_sq", torch.ones(130, dtype=torch.int32)]
    ],
    "state of another shape": [["set_state_data", "o", "p1", "exp_avg_sq", torch.ones(129)]],
    "state in another order": [["set_state_data", "o", "p0", "exp_avg", torch.ones(5, 3).t()]],
    "complex state": [["set_state_data", "o", "p0", "exp_avg", torch.ones(3, 5) + 1j]],
    "master of another dtype": [
        ["set_state_data", "o", "p1", "master", torch.ones(130, dtype=torch.float64)]
    ],
    "master of another shape": [["set_state_data", "o", "p1", "master", torch.ones(1)]],
    "moved": [["move", "o"]],
    "moved twice": [["move", "o"], ["move", "o"]],
    "parameters swapped": [["swap", "o", 0]],
    "parameter removed": [["remove", "o", 0, 1], ["grads", {"p1": None}]],
    "numbers": [["options", "o", 0, dict(weight_decay=0.25, eps=1e-3, betas=(0.5, 0.75))]],
    "maximize": [["options", "o", 1, dict(maximize=True)]],
    "amsgrad": [["options", "o", 0, dict(amsgrad=True)]],
    "whole options": [["set_options", "o", 0, "AdamW", dict(lr=0.125, amsgrad=True, rounding_seed=3)]],
    "lr in a tensor": [["set_options", "o", 0, "AdamW", dict(lr=torch.tensor(0.125), rounding_seed=3)]],
    "bad lr": [["lr", "o", 1, -1.0]],
    "bad betas": [["options", "o", 0, dict(betas=(0.5, 1.0))]],
    "no master any more": [["options", "o", 0, dict(master_weights="none")]],
    "split masters": [["options", "o", 0, dict(master_weights="split")]],
    "FP32 masters": [["options", "o", 0, dict(master_weights="fp32")]],
    "BF16 states": [["options", "o", 0, dict(state_dtype="bfloat16", rounding_seed=5)]],
    "8-bit states": [["options", "o", 0, dict(state_dtype="int8", rounding_seed=5)]],
    "FP32 states": [["options", "o", 0, dict(state_dtype="float32")]],
    "another seed": [["options", "o", 0, dict(rounding_seed=9)]],
    "unknown format": [["options", "o", 0, dict(state_dtype="float16")]],
    "unknown masters": [["options", "o", 0, dict(master_weights="half")]],
    "gradient is a weight": [["grads", grads(SHAPES, HALF, 9)], ["alias", "p3", "p3"], ["step", "o"]],
    "gradient is another's weight": [["grads", grads(SHAPES, HALF, 9)], ["alias", "p1", "p1"], ["step", "o"]],
}


def writes_numbers(poke):
    """Whether it writes FP32 numbers into a state."""
    return any(c[0] in ("write_state", "set_state_data") and c[3] != "step" for c in POKES[poke])


@pytest.mark.parametrize(
    ("mode", "poke"), [(m, p) for m in FORMATS for p in POKES if m == "FP32" or not writes_numbers(p)]
)
def test_pokes(mode, poke, program):
    """Equal to the last bit, or to the last letter."""
    without = {name for p in POKES[poke] if p[0] == "grads" for name, grad in p[1].items() if grad is None}
    commands = [*params(SHAPES, HALF), make("adamw", **FORMATS[mode]), *steps(0, 3), *POKES[poke]]
    same(program, [*commands, *steps(3, 3, [name for name in NAMES if name not in without])])


def test_a_count_that_is_none(program):
    """The op refuses it; all devices' weights stay."""
    start = [*params(SHAPES, HALF), make("adamw"), *steps(0, 3)]
    bad = ["write_state", "o", "p1", "step", torch.tensor(-1.0)]
    good = ["write_state", "o", "p1", "step", torch.tensor(3.0)]
    seen = program.run([*start, bad, ["step", "o"], good, *steps(3, 1)])
    assert seen[12].startswith("ValueError: [adamw_] steps[1] is -1; expected a whole number from 0 to 2^62.")
    assert str(seen[13:]) == str(program.run([*start, *steps(3, 1)])[12:])


@pytest.mark.parametrize("case", ["sgd", "sgd-momentum", "rmsprop", "adam"])
def test_a_state_that_comes_and_goes(case, program):
    """Momentum that is switched on and off, and another rule."""
    on = {"adam": dict(decoupled_weight_decay=True), "rmsprop": dict(momentum=0.5, centered=True)}
    off = {"adam": dict(decoupled_weight_decay=False), "rmsprop": dict(momentum=0.0, centered=False)}
    commands = [*params(SHAPES, HALF), make(case), *steps(0, 2)]
    for i in range(2):
        commands += [
            ["options", "o", 0, on.get(case, dict(momentum=0.5, dampening=0.25))],
            *steps(2 + 4 * i, 2),
        ]
        commands += [["options", "o", 0, off.get(case, dict(momentum=0.0))], *steps(4 + 4 * i, 2)]
    same(program, commands)


@pytest.mark.parametrize("mode", FORMATS)
def test_a_parameter_that_takes_the_place_of_another(mode, program):
    """Its state is its own, whether the old parameter still exists or not; that returns with its state."""
    commands = [*params(SHAPES, HALF), make("adamw", **FORMATS[mode]), *steps(0, 3)]
    commands += [["param", "q", random((2, 3), HALF, 60)], ["replace", "o", 0, 1, "q"]]
    commands += steps(3, 3, ["p0", "q", "p2", "p3"])
    commands += [["replace", "o", 0, 1, "p1"], *steps(6, 3)]
    for i in range(5):  # an address may be that of the one before
        commands += [["param", "q", random((2, 3), HALF, 61 + i)], ["replace", "o", 0, 1, "q"]]
        commands += steps(9 + i, 1, ["p0", "q", "p2", "p3"])
    same(program, commands)


def test_states_of_parameters_that_are_gone_are_freed(program):
    """At the next step that makes new tables."""
    commands = [*params(SHAPES, HALF), make("adamw"), *steps(0, 2)]
    for i in range(20):
        commands += [["param", "q", random((2, 3), HALF, i)], ["replace", "o", 0, 1, "q"]]
        commands += steps(2 + i, 1, ["p0", "q", "p2", "p3"])
    assert program.run([*commands, ["number_of_states", "o"]])[-1] <= len(SHAPES) + 1


@pytest.mark.parametrize("mode", FORMATS)
def test_a_group_that_is_added(mode, program):
    """Between two steps, with options and without; again and again."""
    options = FORMATS[mode]
    commands = [*params(SHAPES, HALF), make("adamw", **options), *steps(0, 3)]
    names = list(NAMES)
    for i, own in enumerate([None, {**options, "lr": 0.25}, {**options, "state_dtype": "float32"}]):
        commands += [["param", f"q{i}", random((2, 3), HALF, 80 + i)], ["add_group", "o", [[f"q{i}"], own]]]
        names.append(f"q{i}")
        commands += steps(3 + 3 * i, 3, names)
    same(program, commands)


def test_groups_that_are_refused(program):
    """Nothing is added."""
    commands = [*params(SHAPES, HALF), make("adamw"), *steps(0, 3), ["param", "q", random((2, 3), HALF, 1)]]
    for names, own in (
        (["q", "q"], None),
        (["q"], dict(lr=-1.0)),
        (["q"], dict(betas=(1.5, 0.5))),
        (["p0"], None),
    ):
        commands += [["add_group", "o", [names, own]], ["state_dict", "o"]]
    same(program, [*commands, *steps(3, 3)])


def test_memory_that_two_parameters_share(program):
    """Disjoint parts of one tensor are fine, overlapping ones are refused before anything is written."""
    whole = ["param", "all", random((12,), HALF, 1)]
    given = {"a": random((6,), HALF, 2), "b": random((6,), HALF, 3)}
    commands = []
    for begin in (6, 5):
        commands += [["reset"], whole, ["part", "a", "all", 0, 6], ["part", "b", "all", begin, begin + 6]]
        commands += [make("adamw", [[["a", "b"], None]])]
        for _ in range(3):
            commands += [["grads", given], ["step", "o"], ["weights", ["a", "b", "all"]]]
    same(program, commands)


def test_a_parameter_that_is_there_twice(program):
    commands = [*params(SHAPES, HALF), make("adamw"), *steps(0, 3), ["replace", "o", 1, 0, "p0"]]
    same(program, [*commands, ["grads", grads(SHAPES, HALF, 3)], ["step", "o"], ["look", "o", NAMES]])


WRONG = {
    "size": (random((7,), HALF, 1), r"[7], torch.float16"),
    "the same number of elements": (random((5, 3), HALF, 1), r"[5, 3], torch.float16"),
    "whole numbers": (torch.ones(3, 5, dtype=torch.int32), r"[3, 5], torch.int32"),
    "complex": (torch.ones(3, 5, dtype=torch.complex64), r"[3, 5], torch.complex64"),
    "wider": (torch.ones(3, 5, dtype=torch.float64), r"[3, 5], torch.float64"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("before", [0, 3])
def test_a_gradient_that_does_not_fit(before, name, program):
    """LibTorch lets a program assign it. All other parameters stay as they were, too."""
    grad, got = WRONG[name]
    start = [*params(SHAPES, HALF), make("adamw"), *steps(0, before), ["weights", NAMES]]
    seen = program.run(
        [
            *start,
            ["grads", grads(SHAPES, HALF, 9) | {"p0": grad}],
            ["step", "o"],
            ["weights", NAMES],
            *steps(9, 1),
        ]
    )
    old, error, new = seen[-7:-4]
    assert error == (
        f"ValueError: [AdamW] group 0: params[0] has a gradient of shape {got} on cpu; expected "
        "shape [3, 5], torch.float32 or narrower on cpu. Cast it."
    )
    assert str(old) == str(new)
    wanted = program.run([*start, *steps(9, 1)])
    assert str(wanted[-4:]) == str(seen[-4:])


def test_inference_mode(program):
    """States that a step makes there can be written outside."""
    commands = [*params(SHAPES, HALF), make("adamw"), ["grads", grads(SHAPES, HALF, 1)]]
    commands += [["step_in_inference_mode", "o"], ["look", "o", NAMES], *steps(2, 3)]
    commands += [["step_in_inference_mode", "o"], ["look", "o", NAMES], *steps(5, 2)]
    same(program, [*commands, ["write_state", "o", "p0", "exp_avg", torch.ones(3, 5)], *steps(7, 2)])


def test_a_closure(program):
    """Its loss is returned, its gradients are used, in a program that has switched gradients off."""
    commands = [["param", "p0", random((3, 5), torch.float32, 1)], make("adamw", [[["p0"], None]])]
    same(program, [*commands, *[["closure", "o", "p0"], ["look", "o", ["p0"]]] * 4])


def test_version_counters(program):
    """Autograd notices that a step has written a weight."""
    seen = program.run(
        [*params(SHAPES, HALF), make("adamw"), ["versions", NAMES], *steps(0, 1), ["versions", NAMES]]
    )
    first = seen[0]
    assert all(b > a for a, b in zip(first, seen[-1], strict=True))
    commands = [*params(SHAPES, HALF), make("adamw"), *steps(0, 3, skip=["p2"]), ["versions", NAMES]]
    *_, third = program.run(commands)
    *_, fourth = program.run([*commands, *steps(3, 1, skip=["p2"]), ["versions", NAMES]])
    assert [b - a for a, b in zip(third, fourth, strict=True)] == [1, 1, 0, 1]


def test_a_scheduler_of_torch(program):
    """It reads and writes learning rates through the base class. torch's in C++ start one step later than
    those in Python."""
    for lr in (0.5, torch.tensor(0.5)):
        (rates,) = program.run([*params(SHAPES, HALF), make("adamw", lr=lr), ["scheduler", "o"]])
        assert rates == [0.5, 0.5, 0.25, 0.25, 0.125, 0.125]


def test_through_the_base_class(program):
    """torch's add_param_group, which is not virtual, gives a group the defaults; options of another class are
    refused, and nothing is written."""
    start = [*params(SHAPES, HALF), make("adamw", [[NAMES[:3], None]]), *steps(0, 2, NAMES[:3])]
    group = [["p3"], BY_NAME["adamw"].options]
    wanted = program.run([*start, ["add_group", "o", group], *steps(2, 3)])
    assert str(program.run([*start, ["add_group_by_base", "o", [["p3"], None]], *steps(2, 3)])) == str(wanted)
    seen = program.run(
        [
            *start,
            ["options_of_another_class", "o"],
            ["grads", grads(SHAPES, HALF, 9)],
            ["step", "o"],
            ["look", "o", NAMES[:3]],
        ]
    )
    assert seen[6] == (
        "TypeError: [AdamW] group 0: has options of torch::optim::AdamWOptions; expected "
        "fusedamp::optim::AdamWOptions, as the optimizer's. Pass such options."
    )
    assert str(seen[3:6]) == str(seen[7:])
