"""What C++ programs do that Python's do not: full disks, typed lists, locales, options in any order."""

import pytest
import torch
from cases import BY_NAME
from cpp_program import compile_
from cpp_twin import World, grads, params, same


@pytest.mark.parametrize(
    "check", ["full disk", "unreadable", "locale", "chains", "moved", "foreign", "refused", "longer"]
)
def test_hard_use(check, program, tmp_path):
    """Checked in C++, which returns what does not hold."""
    *_, failures = program.run([["hard_use", check, str(tmp_path)]])  # torch may warn
    assert failures == ""


def test_lists_of_a_type_are_lists_in_python(program, tmp_path):
    """As std::vector<int64_t>, which torch's pickler writes as a call that weights_only=True rejects."""
    path = str(tmp_path / "lists.pt")
    assert program.run([["lists", path]]) == []
    found = torch.load(path, weights_only=True)
    one, half = found.pop("tensors")
    assert torch.equal(one, torch.ones(2))
    assert half.dtype is torch.float16
    assert found == {"ints": [1, 2], "floats": [0.5], "texts": ["a"], "nested": ([True], 1 + 2j)}


def test_a_parameter_that_changes_its_group_has_the_new_options(program, monkeypatch):
    """Also if the order of all parameters stays."""

    def do_regroup(self, name):
        first, second = self.optimizer(name).param_groups
        second["params"].insert(0, first["params"].pop())

    monkeypatch.setattr(World, "do_regroup", do_regroup, raising=False)
    shapes, case = [(3, 5), (7,), (2, 2)], BY_NAME["adamw"]
    names = ["p0", "p1", "p2"]
    groups = [[names[:2], case.options], [names[2:], case.options | dict(lr=0.25, weight_decay=0.5)]]
    commands = [*params(shapes, torch.float16), ["optimizer", "o", "AdamW", groups, case.options]]
    for step in range(6):
        commands += [["regroup", "o"]] if step == 3 else []
        commands += [["grads", grads(shapes, torch.float16, step)], ["step", "o"], ["look", "o", names]]
    same(program, commands)


def test_fast_math_is_refused(tmp_path):
    """With it, the headers' own checks would let NaN pass."""
    (source := tmp_path / "source.cpp").write_text("#include <fusedamp/version.h>\n")
    assert "fusedamp looks for inf and NaN" in compile_("-fsyntax-only", "-ffast-math", source)
    assert not compile_("-fsyntax-only", "-ffast-math", "-fno-finite-math-only", source)
