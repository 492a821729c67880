"""The classes of C++ are those of Python: names, options and defaults, ops, states, bounds of options."""

import re

import pytest
import torch
from cmake_package import HEADERS
from cpp_twin import NO_EFFECT, difference
from fusedamp import optim
from fusedamp.optim.state import foreign

PYTHON_ONLY = {"Adafactor", "Muon"}
NAMES = [
    name for name in optim.__all__ if hasattr(getattr(optim, name), "states") and name not in PYTHON_ONLY
]


@pytest.fixture(scope="module")
def classes(program):
    """Each class with its defaults, and with every option set."""
    return program.run([["classes"]])


def python(name, options):
    """What Python declares of a class, for options as they are in its groups."""
    cls = getattr(optim, name)
    optimizer = cls([torch.zeros(2, dtype=torch.float64)])
    group = optimizer.defaults | options
    states = []
    for spec in cls.states:
        first = group[spec.first] if isinstance(spec.first, str) else spec.first
        count = -1.0 if spec.count is None else spec.count
        used = spec.when is None or bool(spec.when(group))
        flags = (spec.nonnegative, spec.required, float(first), spec.like is not None, count)
        states.append((spec.name, *flags, spec.restarts, used))
    return {
        "name": name,
        "op": optimizer._op_name(group),
        "defaults": {n: value for n, value in group.items() if n not in NO_EFFECT},
        "states": states,
        "bounds": sorted((n, b.low, b.below) for n, b in cls.bounds.items()),
        "sparse": "_densified" in vars(cls),
    }


def test_every_class_is_there(classes):
    assert [one["name"] for one in classes] == 2 * [one["name"] for one in classes[: len(NAMES)]]
    assert {one["name"] for one in classes} == set(NAMES)


def test_declarations(classes):
    """Of the defaults, and with each option changed."""
    for one in classes:
        one["bounds"].sort()
        assert (found := difference(one, python(one["name"], one["defaults"]), one["name"])) == "", found


def test_the_second_list_changes_every_option(classes):
    for first, second in zip(classes[: len(NAMES)], classes[len(NAMES) :], strict=True):
        same = {name for name, value in first["defaults"].items() if second["defaults"][name] == value}
        # AdamW's is what makes it AdamW.
        assert same <= {"decoupled_weight_decay", "state_dtype"}, first["name"]


def test_every_op_has_a_class(classes):
    """A new line of optimizers.def needs one."""
    assert {one["op"] for one in classes} == set(torch.ops.fusedamp.step_ops().split())


def test_options_of_others(program):
    """Which options of a checkpoint would change the steps: one list in two languages."""
    text = (HEADERS / "fusedamp/source/groups.h").read_text()
    text = text[text.index("inline bool is_rule") :]
    listed = set(re.findall(r'"(\w+)"', text[: text.index("\n}\n")]))
    assert listed == foreign.NO_RULE | {name for name, neutral in foreign.NEUTRAL.items() if neutral}
    names = sorted(listed | foreign.NEUTRAL.keys() | {"d", "own"})
    values = [0, 1, 0.0, 0.5, True, False, float("inf"), -1.0, None, "text", (1, 2)]
    seen = program.run([["is_rule", name, value] for name in names for value in values])
    wanted = [bool(foreign.ignored_options({name: value}, {})) for name in names for value in values]
    assert dict(
        zip([(n, v) for n in names for v in map(str, values)], zip(seen, wanted, strict=True), strict=True)
    ) == {
        (n, v): (w, w)
        for (n, v), w in zip([(n, v) for n in names for v in map(str, values)], wanted, strict=True)
    }
