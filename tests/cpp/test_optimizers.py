"""Optimizers in C++ give the bits of Python: weights and states, in every format, over 24 steps."""

import pytest
import torch
from cases import BY_NAME, CASES, COMPOSED, MAIN, SHAPES
from cpp_twin import grads, params, random, same, train

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64)
FORMATS = [
    {},
    dict(master_weights="split"),
    dict(master_weights="none"),
    dict(master_weights="none", stochastic_rounding=True),
    dict(state_dtype="bfloat16"),
    dict(state_dtype="int8"),
    dict(master_weights="split", state_dtype="int8"),
]
HERE = [case for case in CASES if case.ours not in [composed.ours for composed in COMPOSED]]


def optimizer(case, groups=None, **options):
    """The command that makes an optimizer of ``case``, by default of the parameters of ``SHAPES``."""
    groups = groups or [[[f"p{i}" for i in range(len(SHAPES))], None]]
    return ["optimizer", "o", case.ours.__name__, groups, {**case.options, **options}]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", HERE, ids=str)
def test_bits(case, dtype, program):
    """Each format works, or is refused in the same words."""
    commands = []
    for mode in FORMATS:
        make = optimizer(case, rounding_seed=7, **mode)
        commands += [["reset"], *params(SHAPES, dtype), make, *train(SHAPES, dtype)]
    same(program, commands)


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_groups(case, program):
    """With options of their own and without, of several dtypes; numbers that change between steps, and some
    without a gradient at first."""
    shapes = [(5, 3), (130,), (), (2, 7)]
    commands = (
        params(shapes, torch.float16) + params(shapes, torch.float32, 4) + params(shapes, torch.bfloat16, 8)
    )
    own = case.options | dict(lr=0.002, weight_decay=0.0, maximize=True)
    groups = [[["p0", "p4", "p8"], None], [["p1", "p2", "p3", "p9"], own], [["p5", "p6"], case.options]]
    names = [name for group, _ in groups for name in group]
    commands += [optimizer(case, groups)]
    for step in range(24):
        late = ["p2", "p5"] if step < 9 else ["p4"] if step in (14, 15) else []
        given = {
            f"p{i}": random(shapes[i % 4], d, 100 * step + i)
            for i, d in enumerate([torch.float16] * 4 + [torch.float32] * 4 + [torch.bfloat16] * 4)
        }
        commands += [["grads", given | dict.fromkeys(late)], ["step", "o"]]
        if step == 4:
            commands += [["lr", "o", 0, 0.03125]]
        if step == 12:
            commands += [["options", "o", 1, dict(weight_decay=0.25, maximize=False)]]
        if step == 18:
            commands += [
                *params([(9,)], torch.float16, 20),
                ["add_group", "o", [["p20"], case.options | dict(lr=0.5)]],
            ]
            names.append("p20")
        if step in (0, 1, 8, 9, 17, 23):
            commands += [["look", "o", [*names]]]
    same(program, commands)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_lr_in_a_tensor(case, dtype, program):
    """Also one that two groups share; written by the program or by set_lr."""
    lr = torch.tensor(0.0625, dtype=dtype)
    commands = [*params(SHAPES, torch.float16), optimizer(case, lr=lr)]
    commands += [*train(SHAPES, torch.float16, range(6)), ["lr", "o", 0, 0.25]]
    same(program, commands + train(SHAPES, torch.float16, range(6, 12)))


LAYOUTS = {
    "channels-last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "gaps": lambda t: torch.stack((t, t), -1)[..., 0],
    "a row of more": lambda t: torch.cat((t, t, t))[len(t) : 2 * len(t)],
}


@pytest.mark.parametrize(
    "mode",
    [{}, *(dict(master_weights=m, state_dtype=s) for m, s in (("split", "int8"), ("none", "bfloat16")))],
    ids=str,
)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("adamw", "sgd-momentum", "lamb")], ids=str)
def test_layouts(case, layout, mode, program):
    """Of parameters and of gradients, equal and different. Checkpoints have the same bytes."""
    shapes = [(3, 5, 4, 2), (2, 1, 3, 3), (1, 4, 1, 1)]
    arrange = LAYOUTS[layout]
    commands = [[what, name, arrange(value)] for what, name, value in params(shapes, torch.float16)]
    commands += [optimizer(case, [[["p0", "p1", "p2"], None]], rounding_seed=3, **mode)]
    for step in range(8):
        plain = grads(shapes, torch.float16, step)
        commands += [["grads", {n: arrange(g) if step % 4 else g for n, g in plain.items()}], ["step", "o"]]
        if step in (0, 3, 4, 7):
            commands += [["look", "o", ["p0", "p1", "p2"]]]
    same(program, [*commands, ["state_dict", "o"]])


FORMS = ["sparse", "transposed", "expanded", "gaps", "negated"]


@pytest.mark.parametrize("form", [*FORMS, "conj"])
@pytest.mark.parametrize("case", [BY_NAME[n] for n in ("sgd-momentum", "adagrad", "adamw")], ids=str)
def test_forms_of_gradients(case, form, program):
    """Views and sparse gradients. AdamW takes none that is sparse, and says so before it writes anything."""
    dtype = torch.complex64 if form == "conj" else torch.float16
    shapes = [(6, 4), (5, 5)]
    commands = [*params(shapes, dtype), optimizer(case, [[["p0", "p1"], None]])]
    for step in range(6):
        commands += [["grads", grads(shapes, dtype, step)]]
        commands += [["form", "p1", form]] if step != 3 else []
        commands += [["step", "o"], ["weights", ["p0", "p1"]]]
    same(program, [*commands, ["look", "o", ["p0", "p1"]]])


@pytest.mark.parametrize(
    "grad_dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64], ids=str
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes_of_gradients(dtype, grad_dtype, program):
    """Those as wide as the master or narrower; others are refused. They may change between steps."""
    shapes = [(6, 4), (131,)]
    commands = [*params(shapes, dtype), optimizer(BY_NAME["adamw"], [[["p0", "p1"], None]])]
    for step in range(5):
        kind = dtype if step == 2 else grad_dtype
        commands += [["grads", grads(shapes, kind, step)], ["step", "o"], ["look", "o", ["p0", "p1"]]]
    same(program, commands)
