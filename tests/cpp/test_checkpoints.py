"""Checkpoints of C++ are those of Python: in both directions, from each format into each, of
torch.optim, by torch::save. What can't be loaded is refused in Python's words and changes nothing.
"""

import copy

import pytest
import torch
from cases import BY_NAME, MAIN, WITH_TORCH
from cpp_twin import params, random, same, train
from test_optimizers import FORMATS

SHAPES = [(3, 5), (), (130,), (0,), (4, 0, 2), (2, 3, 4, 1)]
NAMES = [f"p{i}" for i in range(len(SHAPES))]


def make(case, **options):
    return ["optimizer", "o", case.ours.__name__, [[NAMES, None]], {**case.options, **options}]


def fitting(case):
    """The formats that ``case`` has."""
    plain = [mode for mode in FORMATS if "state_dtype" not in mode]
    return plain if case.options.get("centered") else FORMATS


def weights(seen):
    """Commands that make parameters of the weights that were seen."""
    return [["param", name, entry["weight"]] for name, entry in zip(NAMES, seen, strict=True)]


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_from_each_format_into_each(case, program):
    """The file that C++ wrote resumes in Python, and the other way: both are the same."""
    commands, trained = [], {}
    for mode in fitting(case):
        commands += [["reset"], *params(SHAPES, torch.bfloat16), make(case, rounding_seed=5, **mode)]
        commands += [*train(SHAPES, torch.bfloat16, range(2)), ["state_dict", "o"]]
    seen = same(program, commands)
    size = 2 * len(SHAPES) + 1
    for i in range(len(fitting(case))):
        part = seen[i * size : (i + 1) * size]
        trained[i] = (weights(part[len(SHAPES) : -1]), part[-1])
    commands = []
    for start, state in trained.values():
        for mode in fitting(case):
            commands += [
                ["reset"],
                *start,
                make(case, rounding_seed=9, **mode),
                ["load_state_dict", "o", state],
            ]
            commands += [*train(SHAPES, torch.bfloat16, range(2, 4)), ["state_dict", "o"]]
    same(program, commands)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64, torch.complex64], ids=str)
@pytest.mark.parametrize("case", WITH_TORCH, ids=str)
def test_of_torch(case, dtype, program):
    """Of torch's optimizers in Python."""
    own = [torch.nn.Parameter(random(shape, dtype, i).clone()) for i, shape in enumerate(SHAPES)]
    theirs = case.torch(own, **case.options)
    for step in range(3):
        for i, param in enumerate(own):
            param.grad = random(param.shape, dtype, step * 10 + i)
        theirs.step()
    start = [["param", name, param.detach()] for name, param in zip(NAMES, own, strict=True)]
    commands = [*start, make(case), ["load_state_dict", "o", theirs.state_dict()]]
    same(program, [*commands, *train(SHAPES, dtype, range(3, 6)), ["state_dict", "o"]])


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_an_archive_of_torch(case, program):
    """torch::save and torch::load, also into another format; options of the first, formats of the second."""
    commands = []
    for mode in fitting(case):
        commands += [["reset"], *params(SHAPES, torch.float16), make(case, rounding_seed=5, lr=0.03125)]
        commands += [*train(SHAPES, torch.float16, range(2))]
        other = make(case, **mode)
        commands += [[other[0], "other", *other[2:]], ["archive", "o", "other"]]
        commands += [
            ["look", "other", NAMES],
            ["step", "other"],
            ["look", "other", NAMES],
            ["state_dict", "other"],
        ]
    same(program, commands)


def test_the_order_of_memory_is_saved(program):
    """8-bit states of dense parameters in any order of dimensions, with their block scales."""
    shapes = [(3, 5, 4, 2), (130, 2), (6, 3, 2)]
    first = params(shapes, torch.float16)
    orders = [(0, 2, 3, 1), (1, 0), (2, 0, 1)]
    first = [
        [what, name, value.permute(order).contiguous().permute([order.index(d) for d in range(len(order))])]
        for (what, name, value), order in zip(first, orders, strict=True)
    ]
    case, commands = BY_NAME["adamw"], []
    options = {**case.options, "state_dtype": "int8", "rounding_seed": 3, "master_weights": "split"}
    kinds = ["optimizer", "o", "AdamW", [[["p0", "p1", "p2"], None]], options]
    seen = same(program, [*first, kinds, *train(shapes, torch.float16, range(3)), ["state_dict", "o"]])
    for state_dtype in ("int8", "float32"):
        again = [*kinds[:4], {**options, "state_dtype": state_dtype}]
        commands += [["reset"], *first, again, ["load_state_dict", "o", seen[-1]]]
        commands += [*train(shapes, torch.float16, range(3, 5)), ["state_dict", "o"]]
    same(program, commands)


def test_options(program):
    """Numbers and switches come from the checkpoint, formats do not. What others wrote into a group stays."""
    start = [*params(SHAPES, torch.float16), make(BY_NAME["adamw"])]
    seen = same(program, [*start, ["state_dict", "o"]])
    group = seen[-1]["param_groups"][0]
    edits = [
        dict(lr=0.25, betas=(0.5, 0.75), eps=1, weight_decay=0, amsgrad=True, maximize=True),
        dict(
            initial_lr=0.5, name="head", master_weights="none", state_dtype="int8", stochastic_rounding=True
        ),
        dict(momentum=0, nesterov=False, dampening=0, correct_bias=True, rounding_seed=11),
        dict(momentum=0.5, d=1.0, nesterov=True, foreach=None, fused=True, decoupled_weight_decay=False),
        dict(rounding_seed=None, some=[1, 2], other={"a": 1}),
    ]
    commands = []
    for edit in edits:
        state = {"state": {}, "param_groups": [group | edit]}
        commands += [["reset"], *start, ["load_state_dict", "o", state], ["state_dict", "o"]]
        commands += train(SHAPES, torch.float16, range(2))
    same(program, commands)
    missing = {name: value for name, value in group.items() if name not in ("eps", "betas", "rounding_seed")}
    same(
        program,
        [*start, ["load_state_dict", "o", {"state": {}, "param_groups": [missing]}], ["state_dict", "o"]],
    )


def test_a_learning_rate_in_a_tensor(program):
    """It stays the optimizer's tensor, and gets the checkpoint's value."""
    lr = torch.tensor(0.5)
    start = [*params(SHAPES, torch.float16), make(BY_NAME["adamw"], lr=lr), ["state_dict", "o"]]
    (first,) = same(program, start)
    for saved in (0.25, torch.tensor(0.125, dtype=torch.float64)):
        state = {"state": {}, "param_groups": [first["param_groups"][0] | {"lr": saved}]}
        (_, second) = program.run([*start, ["load_state_dict", "o", state], ["state_dict", "o"]])
        assert torch.equal(second["param_groups"][0]["lr"], torch.tensor(float(saved)))
    state = {"state": {}, "param_groups": [first["param_groups"][0] | {"lr": torch.tensor(0.125)}]}
    commands = [*params(SHAPES, torch.float16), make(BY_NAME["adamw"]), ["load_state_dict", "o", state]]
    same(program, [*commands, *train(SHAPES, torch.float16, range(3))])


@pytest.mark.parametrize("kind", ["LAMB", "LARS", "NovoGrad", "RMSprop", "NAdam", "SGD", "Lion"])
def test_options_of_another_optimizer(kind, program):
    """They are kept, and named in a warning if they would change the steps."""
    case = next(case for case in MAIN if case.ours.__name__ == kind)
    commands = []
    for other in MAIN:
        if other.ours is case.ours:
            continue
        group = other.ours([torch.zeros(2)], **other.options).state_dict()["param_groups"][0]
        state = {"state": {}, "param_groups": [group | {"params": list(range(len(SHAPES)))}]}
        commands += [["reset"], *params(SHAPES, torch.float16), make(case)]
        commands += [["load_state_dict", "o", state], ["state_dict", "o"]]
    same(program, commands)


VALUES = {
    "numbers": [1, -(2**62), 0.5, float("inf"), -0.0, True, False, None, "text", ""],
    "containers": {"a": [], "b": {}, "c": (1, (2.0, "x")), "d": [[1], [2.5, {"e": None}]], "f": {1: 2, 3: 4}},
    "tensors": [
        torch.arange(6).view(2, 3).t(),
        torch.tensor(2.5),
        torch.zeros(0, 3),
        torch.tensor([True, False]),
    ],
    "dtypes": [random((3,), d, 1) for d in (torch.float16, torch.bfloat16, torch.float64, torch.complex128)],
    "codes": [torch.arange(4, dtype=d) for d in (torch.int8, torch.uint8, torch.int16, torch.int32)],
    "views": [
        torch.arange(9.0)[3:5],
        torch.arange(9.0)[::3],
        torch.arange(24.0).view(2, 3, 4).permute(2, 0, 1),
    ],
    "expanded": [torch.ones(1).expand(4)],
}


@pytest.mark.parametrize("name", VALUES)
def test_values(name, program, tmp_path):
    """Python reads what C++ wrote, C++ reads what both wrote."""
    path = str(tmp_path / "value.pt")
    torch.save(VALUES[name], path)
    same(program, [["echo", VALUES[name]]])
    first, second = program.run([["load", path], ["save", path, VALUES[name]], ["load", path]])
    assert str(first) == str(second) == str(torch.load(path, weights_only=True)) == str(VALUES[name])


def test_shared_memory_stays_shared(program):
    """It is written once."""
    base = torch.arange(1000.0)
    ((one, two),) = program.run([["echo", [base[:10], base[5:]]]])
    one[5:] = -1
    assert two[:5].eq(-1).all()


def test_a_file_appears_whole_or_not_at_all(program, tmp_path):
    """No error leaves a file, or harms one that is there."""
    (path := tmp_path / "state.pt").write_bytes(b"old")
    (nowhere,) = program.run([["save", str(tmp_path / "none/state.pt"), 1]])
    assert nowhere.startswith(f"RuntimeError: [save] {tmp_path}/none/state.pt could not be written; expected")
    assert nowhere.endswith("Its error is: No such file or directory. What was there is unchanged.")
    (folder := tmp_path / "folder").mkdir()
    (refused,) = program.run([["save", str(folder), 1]])
    assert refused.startswith(f"RuntimeError: [save] {folder} could not be written; expected a path")
    assert not program.run([["save", str(path), 1]])
    assert torch.load(path, weights_only=True) == 1
    assert {p.name for p in tmp_path.iterdir()} == {"state.pt", "folder"}


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "missing", "module"])
def test_a_file_that_is_no_checkpoint(damage, program, tmp_path):
    """An error, after which the optimizer is as before."""
    path = tmp_path / "state.pt"
    start = [*params(SHAPES, torch.float16), make(BY_NAME["adamw"]), *train(SHAPES, torch.float16, range(2))]
    torch.save({"a": torch.arange(100.0)}, path)
    if damage == "cut":
        path.write_bytes(path.read_bytes()[:-200])
    elif damage == "module":  # an OrderedDict, which LibTorch does not read
        torch.save(torch.nn.Linear(2, 2).state_dict(), path)
    elif damage == "missing":
        path.unlink()
    else:
        path.write_text("" if damage == "empty" else "no checkpoint " * 100)
    seen = program.run([*start, ["load", str(path)], ["look", "o", NAMES]])
    message = seen[-len(NAMES) - 1]
    what = " holds an OrderedDict" if damage == "module" else " could not be read"
    assert message.startswith(f"RuntimeError: [load] {path}{what}")
    assert ("Save dict(model.state_dict())." in message) == (damage == "module")
    looks = program.run([*start, ["look", "o", NAMES]])[-len(NAMES) :]
    for now, before in zip(seen[-len(NAMES) :], looks, strict=True):
        assert torch.equal(now["weight"], before["weight"])


def edited(**changes):
    """An edit of a state dict: new items of the state of parameter 0; None removes one."""

    def edit(state):
        for name, value in changes.items():
            state["state"][0][name] = value(state["state"][0][name]) if callable(value) else value
            if value is None:
                del state["state"][0][name]

    return edit


def group_edited(**changes):
    return lambda state: state["param_groups"][0].update(changes)


def without(name):
    return lambda state: state.pop(name)


def half(t):
    return t[:1]


EDITS = {
    "no state": without("state"),
    "no groups": without("param_groups"),
    "two groups": lambda state: state["param_groups"].append(state["param_groups"][0]),
    "fewer parameters": lambda state: state["param_groups"][0]["params"].pop(),
    "shape": edited(exp_avg=half),
    "complex": edited(exp_avg=lambda t: t + 0j),
    "whole numbers": edited(exp_avg=lambda t: t.long()),
    "no tensor": edited(exp_avg="text"),
    "a list": edited(exp_avg=[1.0]),
    "a number": edited(exp_avg=1.5),
    "no moment": edited(exp_avg_sq=None),
    "no count": edited(step=None),
    "negative count": edited(step=torch.tensor(-1.0)),
    "half a step": edited(step=torch.tensor(1.5)),
    "count as a number": edited(step=3),
    "bad count as a number": edited(step=-3),
    "too many steps": edited(step=2.0**63),
    "two counts": edited(step=torch.zeros(2)),
    "NaN steps": edited(step=torch.tensor(float("nan"))),
    "count as text": edited(step="one"),
    "master's shape": edited(master=half),
    "master's dtype": edited(master=lambda t: t.to(torch.int32)),
    "master is text": edited(master="text"),
    "FP64 master": edited(master=lambda t: t.double()),
    "no master": edited(master=None),
    "lr": group_edited(lr=-1.0),
    "lr is infinite": group_edited(lr=float("inf")),
    "NaN eps": group_edited(eps=float("nan")),
    "betas": group_edited(betas=(0.9, 1.0)),
    "one beta": group_edited(betas=(0.9,)),
    "weight_decay": group_edited(weight_decay=1e39),
    "seed": group_edited(rounding_seed=-1),
    "seed is text": group_edited(rounding_seed="one"),
    "lr is text": group_edited(lr="one"),
    "lr is None": group_edited(lr=None),
    "lr is a tensor of two": group_edited(lr=torch.ones(2)),
    "betas are one number": group_edited(betas=0.5),
    "a beta is text": group_edited(betas=[0.5, "one"]),
    "others' tensors": edited(kahan_comp=torch.ones(3)),
    "others' text": edited(kahan_comp="none"),
    "empty state": lambda state: state["state"].update({0: {}}),
    "None": edited(exp_avg=lambda t: None),
    "own items": edited(mine=torch.arange(3), note="text"),
}
EDITS_8_BIT = {
    "scales are gone": edited(exp_avg_scale=None),
    "scales are None": edited(exp_avg_scale=lambda t: None),
    "scales' shape": edited(exp_avg_scale=lambda t: torch.ones(7)),
    "scales' dtype": edited(exp_avg_scale=lambda t: t.double()),
    "no powers of two": edited(exp_avg_scale=lambda t: t * 1.5),
    "negative scales": edited(exp_avg_scale=lambda t: -t),
    "NaN scales": edited(exp_avg_scale=lambda t: t * float("nan")),
    "cast": edited(exp_avg=lambda t: t.float()),
    "cast, without scales": edited(exp_avg=lambda t: t.float(), exp_avg_scale=None),
    "own numbers": edited(
        exp_avg=lambda t: t.float(), exp_avg_scale=None, exp_avg_numel=0, exp_avg_order=None
    ),
    "unsigned": edited(exp_avg=lambda t: t.view(torch.uint8)),
    "signed": edited(exp_avg_sq=lambda t: t.view(torch.int8)),
    "size": edited(exp_avg_numel=99),
    "cut": edited(exp_avg=half, exp_avg_scale=half),
    "order": edited(exp_avg_order=64 * 64 + 64 * 1 + 1),
    "no order": edited(exp_avg_order=None),
    "no size": edited(exp_avg_numel=None),
    "remainder cast": edited(master=lambda t: t.float()),
    "remainder cut": edited(master=lambda t: t[:1]),
    "remainder without a size": edited(master_numel=None),
    "remainder gone": edited(master=None),
    "remainder's size": edited(master_numel=3),
}


@pytest.mark.parametrize("edit", [*EDITS, *EDITS_8_BIT])
def test_an_edited_checkpoint(edit, program):
    """Loads with the same result, or is refused in the same words, and then nothing has changed."""
    case = BY_NAME["adamw"]
    options = dict(state_dtype="int8", master_weights="split", rounding_seed=4) if edit in EDITS_8_BIT else {}
    start = [*params(SHAPES, torch.float16), make(case, **options)]
    first = [*start, *train(SHAPES, torch.float16, range(2))]
    seen = same(program, [*first, ["state_dict", "o"]])
    (EDITS | EDITS_8_BIT)[edit](state := copy.deepcopy(seen[-1]))
    last = [["load_state_dict", "o", state], ["state_dict", "o"], *train(SHAPES, torch.float16, range(2, 4))]
    seen = same(program, [*first, *last])
    if isinstance(error := seen[2 * len(SHAPES)], str) and "Error" in error:
        whole = same(program, [*first, ["state_dict", "o"], *train(SHAPES, torch.float16, range(2, 4))])
        same_as_without = [*seen[: 2 * len(SHAPES)], *seen[2 * len(SHAPES) + 1 :]]
        assert str(same_as_without) == str(whole)
