"""Steps of all groups in one call, from tables that are kept, and the gradient check that concludes.

Guards: a group's numbers used for another one's rows, a step that differs from the public op's in one bit, a
norm or coefficient that differs from torch's, a log that counts wrongly, tables that no step may take.
"""

import math

import pytest
import torch
from fusedamp.ops import library
from fusedamp.tensors import addresses
from op_calls import same_bits, same_numbers
from step_tables import Group, grads_of, groups_of, planned_step, rows_of

OPS = torch.ops.fusedamp
HYPER = {
    **dict(beta1=0.9, beta2=0.99, eps=0.05, weight_decay=0.3, momentum=0.8, dampening=0.25, nesterov=0.0),
    **dict(lr_decay=0.2, alpha=0.9, decoupled=1.0, decay_base=0.96, bias_correction=1.0, trust_clip=0.5),
    **dict(adapt=1.0, trust_coefficient=0.1, grad_averaging=1.0),
}
STATES = {  # tensors of the parameter's size, scalars
    **dict(adamw_=(2, 0), adam_=(3, 0), sgd_=(1, 0), lion_=(1, 0), adagrad_=(1, 0), rmsprop_=(2, 0)),
    **dict(rmsprop_centered_=(3, 0), radam_=(2, 0), nadam_=(2, 1), lamb_=(2, 0), lars_=(1, 0)),
    **dict(novograd_=(1, 1)),
}
SIZES = (5, 0, 40_000, 129)
UPDATED = ("master", "split", "bf16", "fp32", "fp64")
SOME = ("adamw_", "sgd_", "nadam_", "lamb_", "novograd_")


def made(op, storage="fp32", seed=0, scaled_by=1.0, sizes=SIZES, **options):
    """One group with tensors of ``sizes``."""
    torch.manual_seed(seed)
    tensors, scalars = STATES[op]
    dtype = {"fp32": torch.float32, "fp64": torch.float64}.get(storage, torch.bfloat16)
    params = [torch.randn(n).to(dtype) for n in sizes]
    masters, states, scales = [], [], []
    if storage == "master":
        masters = [p.float() for p in params]
    if storage == "split":
        masters = [torch.randint(-9, 9, p.shape, dtype=torch.int16) for p in params]
    for _ in range(tensors):
        states += [torch.rand(n) for n in sizes]
    if storage == "fp64":
        states = [state.double() for state in states]
    if storage == "split":
        states = [state.bfloat16() for state in states]
    states += [torch.tensor(0.5, dtype=torch.float64) for _ in range(scalars * len(sizes))]
    hyper = [HYPER[name] * scaled_by for name in OPS._hyper_names(op).split()]
    grads = [torch.randn(n).to(dtype) for n in sizes]
    steps = [torch.tensor(3.0) for _ in sizes]
    return Group(op, params, grads, masters, states, steps, scales, hyper=hyper, **options)


def both_ways(groups, **scalars):
    """The same step by the public ops, group by group, and in one call."""
    apart = [group.copy() for group in groups]
    for group in apart:
        group.step(**scalars)
    planned_step(groups, **scalars)
    for one, other in zip(apart, groups, strict=True):
        for mine, its in zip(one.changed(), other.changed(), strict=True):
            assert same_bits(mine, its)


@pytest.mark.parametrize("op", STATES)
def test_every_op(op):
    both_ways([made(op), made(op, seed=1, scaled_by=0.7, lr=0.02, maximize=True)])


@pytest.mark.parametrize("storage", ["fp64", "master", "split", "bf16"])
@pytest.mark.parametrize("op", SOME)
def test_every_storage(op, storage):
    """Also rows of several formats in one group, and separate seeds."""
    stochastic = storage == "bf16"
    groups = [
        made(op, storage, stochastic_rounding=stochastic, seeds=[7, 8, 9, 10]),
        made(op, "fp32", seed=1, maximize=True),
        made(op, storage, seed=2, lr_tensor=torch.tensor(0.2, dtype=torch.float64)),
        made(op, storage, seed=3, lr_tensor=torch.tensor(0.3)),
    ]
    both_ways(groups, inv_scale=torch.tensor(0.125), clip_coef=torch.tensor(0.5), found_inf=torch.tensor(0.0))


def test_8_bit_states():
    groups = [made("lion_", seed=seed, lr=0.1 + seed) for seed in (0, 1)]
    for group in groups:
        group.states = [torch.randint(-127, 127, s.shape, dtype=torch.int8) for s in group.states]
        group.scales = [torch.full(((n + 127) // 128,), 0.5) for n in SIZES]
    both_ways(groups)


@pytest.mark.parametrize("due", [None, 0, 1])
@pytest.mark.parametrize("found_inf", [0.0, 1.0])
def test_updates(due, found_inf):
    """A row for each row of the table, whatever the rules; what the public ops write."""
    groups = [made(op, storage, seed=k) for k, (op, storage) in enumerate(zip(SOME, UPDATED, strict=True))]
    made_one = {} if due is None else {"due": torch.tensor(due, dtype=torch.int32)}
    scalars = dict(found_inf=torch.tensor(found_inf))
    apart = [group.copy() for group in groups]
    updates, wanted = (torch.full((len(groups) * len(SIZES), 4), -7.0, dtype=torch.float64) for _ in "12")
    for k, group in enumerate(apart):
        group.step(**scalars, **made_one, updates=wanted[k * len(SIZES) : (k + 1) * len(SIZES)])
    planned_step(groups, **scalars, **made_one, updates=updates)
    assert torch.equal(updates, wanted)
    assert (updates[0, 0] == -7.0) == (due == 0 or found_inf != 0.0)
    for one, other in zip(apart, groups, strict=True):
        assert all(map(same_bits, one.changed(), other.changed()))


def test_rules_in_turn_and_many_groups():
    both_ways([made(op, seed=k, lr=0.01 * (k + 1)) for k, op in enumerate((*SOME, *SOME, "sgd_", "sgd_"))])
    many = [made("adamw_", seed=k, lr=0.01 * (k + 1), maximize=k % 2 == 1, sizes=(3,)) for k in range(70)]
    both_ways(many)


def test_groups_without_rows():
    """A group may be empty; so may all."""
    group = made("sgd_")
    empty = Group("sgd_", [], [], [], [], [])
    tables = groups_of([group])[[0, 0, 0]]
    tables[0, 11], tables[2, 10], tables[2, 11] = 0, len(SIZES), 0  # first and count
    rows = rows_of([empty, group, empty])
    apart = group.copy()
    apart.step()
    OPS._check_plan(rows, tables, group.params[0])
    OPS._planned_step_(rows, grads_of([group]), tables, group.params[0])
    assert all(map(same_bits, apart.changed(), group.changed()))
    steps = torch.tensor(0)
    nothing = rows[:0]
    OPS._planned_step_(nothing, grads_of([empty]), nothing, group.params[0], log_steps=steps)
    assert steps == 1


@pytest.mark.parametrize("found_inf", [0.0, -0.0, 1.0, 2.0, math.nan])
@pytest.mark.parametrize("rows", [0, 4])
def test_log(found_inf, rows):
    """Every step counts; if it is skipped, the counts and the number of the step are stored."""
    groups = [made("adamw_"), made("adamw_", "bf16")] if rows else []
    before = [group.copy() for group in groups]
    like, skipped = torch.zeros(()), found_inf != 0
    counts = torch.arange(24).view(8, 3)
    log_counts, log_step, log_steps = torch.full((8, 3), -1), torch.tensor(-1), torch.tensor(41)
    log = dict(counts=counts, log_counts=log_counts, log_step=log_step, log_steps=log_steps)
    call = rows_of(groups), grads_of(groups), groups_of(groups), like
    OPS._planned_step_(*call, found_inf=torch.tensor(found_inf), **log)
    assert log_steps == 42
    assert log_step == (42 if skipped else -1)
    assert torch.equal(log_counts, counts if skipped else torch.full((8, 3), -1))
    for group, was in zip(groups, before, strict=True):
        for now, then in zip(group.changed(), was.changed(), strict=True):
            assert not skipped or same_bits(now, then)
        assert all(step == (3 if skipped else 4) for step in group.steps)
    OPS._planned_step_(*call, log_steps=log_steps)
    OPS._planned_step_(*call)
    assert log_steps == 43


# Columns of a row, of a group.
PARAM, MASTER, STATE, SCALE, STEP, SQUARES, NUMEL, PLACE, KINDS, FLAGS = 0, 1, 2, 5, 8, 9, 10, 12, 15, 16
FIRST, COUNT, RULE = 10, 11, 12
F16, F32, F64, I8, I16 = 0, 2, 3, 4, 6


def kinds(param, grad=F32, master=F32, state=F32, group=0):
    return group | grad << 32 | param << 40 | master << 48 | state << 56


@pytest.mark.parametrize(
    ("column", "value", "text"),
    [
        (NUMEL, -1, "has -1 elements or lacks an address"),
        (PARAM, 0, "lacks an address"),
        (STATE, 0, "lacks an address"),
        (STATE + 1, 0, "lacks an address"),
        (STEP, 0, "lacks an address"),
        (KINDS, kinds(7), "has dtype codes 7, 2, 2, 2 of param"),
        (KINDS, kinds(I8), "for a param"),
        (KINDS, kinds(F32, I16), "for its gradient"),
        (KINDS, kinds(F32, F64), "for its gradient"),
        (KINDS, kinds(F32, state=F64), "for its states"),
        (KINDS, kinds(F32, state=F16), "for its states"),
        (KINDS, kinds(F32, state=5), "for its states"),
        (KINDS, kinds(F32, state=I8), "lacks an address"),  # of scales
        (KINDS, kinds(F64, F64), "for its states"),
        (KINDS, kinds(F32, group=1), r"is of group 1; expected 0"),
        (KINDS, kinds(F32, group=-1), r"is of group -1; expected 0"),
        (MASTER, 8, "for its master"),
        (SQUARES, 8, "is of a shard; expected whole tensors"),
        *((PLACE + i, 1, "is of a shard; expected whole tensors") for i in range(2)),
        (FLAGS, 2, "has flags 2 and 0"),
        (FLAGS, 2 << 8, "has flags 0 and 2"),
    ],
)
def test_rows_that_no_op_takes_are_refused(column, value, text):
    groups = [made("adamw_", sizes=(3, 3)), made("adamw_", sizes=(3,))]
    rows = rows_of(groups)
    assert rows[1, KINDS] == kinds(F32)
    rows[1, column] = value
    with pytest.raises(RuntimeError, match=r"\[adamw_\] rows\[1\] ") as caught:
        OPS._check_plan(rows, groups_of(groups), groups[0].params[0])
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("row", "column", "value", "text"),
    [
        (1, FIRST, 3, r"groups\[1\] has 1 rows from 3; expected 0 or more from 2 of 3 rows"),
        (0, FIRST, 1, r"groups\[0\] has 2 rows from 1; expected 0 or more from 0"),
        (0, COUNT, -1, r"groups\[0\] has -1 rows"),
        (1, COUNT, 2, r"groups\[1\] has 2 rows from 2"),
        (1, COUNT, 2**62, r"groups\[1\] has \d+ rows from 2"),
        (1, COUNT, 0, r"groups have 2 rows; expected all 3"),
        (1, RULE, -1 % 2**32, r"groups\[1\] has rule -1; expected a number that _rule_of gives"),
        (1, RULE, 999, r"groups\[1\] has rule 999"),
    ],
)
def test_groups_that_are_none_are_refused(row, column, value, text):
    groups = [made("adamw_", sizes=(3, 3)), made("adamw_", sizes=(3,))]
    tables, rows = groups_of(groups), rows_of(groups)
    tables[row, column] = value
    before = [group.copy() for group in groups]
    with pytest.raises(RuntimeError, match=rf"\[_check_plan\] {text}"):
        OPS._check_plan(rows, tables, groups[0].params[0])
    with pytest.raises(RuntimeError, match=rf"\[_planned_step_\] {text}"):
        OPS._planned_step_(rows, grads_of(groups), tables, groups[0].params[0])
    for group, was in zip(groups, before, strict=True):
        assert all(map(same_bits, group.changed(), was.changed()))


def test_steps_that_are_refused_change_nothing():
    groups = [made("adamw_"), made("sgd_")]
    rows, grads, tables, like = rows_of(groups), grads_of(groups), groups_of(groups), groups[0].params[0]
    before = [group.copy() for group in groups]

    def refuses(text, *call, **scalars):
        with pytest.raises(RuntimeError, match=text):
            OPS._planned_step_(*call, **scalars)

    refuses(r"\[_planned_step_\] rows are int32", rows.int(), grads, tables, like)
    refuses(r"\[_planned_step_\] rows are int64", rows.t(), grads, tables, like)
    refuses(r"\[_planned_step_\] rows are int64", rows[:, :11].contiguous(), grads, tables, like)
    refuses(r"\[_planned_step_\] groups are float64", rows, grads, tables.double(), like)
    refuses(r"\[_planned_step_\] grads has 7 addresses; expected 8", rows, grads[1:], tables, like)
    wide, number = torch.zeros((), dtype=torch.float64), torch.tensor(0)
    for name in ("inv_scale", "clip_coef", "found_inf"):
        refuses(rf"\[adamw_\] {name} is float64", rows, grads, tables, like, **{name: wide})
    refuses(r"\[adamw_\] log_steps is float64", rows, grads, tables, like, log_steps=wide)
    refuses(r"\[adamw_\] log_steps is missing", rows, grads, tables, like, log_step=number)
    log = dict(log_steps=number, log_counts=torch.zeros(3, dtype=torch.int64))
    refuses(r"\[adamw_\] counts has 0 elements; expected 3", rows, grads, tables, like, **log)
    log["counts"] = torch.zeros(3)
    refuses(r"\[adamw_\] counts is float32", rows, grads, tables, like, **log)
    log["counts"] = torch.zeros(4, dtype=torch.int64)
    refuses(r"\[adamw_\] counts has 4 elements; expected 3", rows, grads, tables, like, **log)
    missing = grads.clone()
    missing[2] = 0
    refuses(r"\[adamw_\] rows\[2\] has 40000 elements or lacks", rows, missing, tables, like)
    if like.is_cpu:
        for step in (groups[1].steps[2], before[1].steps[2]):
            step.fill_(1.5)
        refuses(r"\[sgd_\] steps\[2\] is 1.5; expected a whole number", rows, grads, tables, like)
    assert number == 0
    for group, was in zip(groups, before, strict=True):
        assert all(map(same_bits, group.changed(), was.changed()))


def test_rules_and_names():
    assert OPS._rule_of("adamw_", 2) != OPS._rule_of("adamw_", 3)
    with pytest.raises(RuntimeError, match=r"\[adamw_\] states has 1 tensors for 1 params; expected 2 or 3"):
        OPS._rule_of("adamw_", 1)
    for ask in (lambda: OPS._rule_of("bogus_", 1), lambda: OPS._hyper_names("bogus_")):
        with pytest.raises(RuntimeError, match=r"bogus_ is no step op"):
            ask()
    names = {op: OPS._hyper_names(op) for op in library.STEP_OPS}
    assert names["adamw_"] == "beta1 beta2 eps weight_decay"
    assert names["nadam_"] == "beta1 beta2 eps weight_decay decoupled decay_base"
    assert {*" ".join(names.values()).split()} == {*HYPER}


# The gradient check ----------------------------------------------------------------------------------------


def some_grads(kind):
    torch.manual_seed(4)
    grads = [torch.randn(n) * 8 for n in (3, 70_000, 0, 129)]
    grads[1] = grads[1].bfloat16()
    if kind == "fp64":
        grads[3] = grads[3].double()
    if kind == "zeros":
        grads = [torch.zeros_like(grad) for grad in grads]
    if kind == "bad":
        grads[0][1], grads[3][5], grads[3][6] = math.inf, math.nan, 3e38
    return grads


@pytest.mark.parametrize("kind", ["plain", "fp64", "zeros", "bad"])
@pytest.mark.parametrize("p", [2.0, 1.0, 0.0, math.inf, 3.0, 0.5, 1 / 3, 4.0, 7.5])
@pytest.mark.parametrize("wide", [False, True])
def test_check_is_what_torch_makes_of_the_read_pass(kind, p, wide):
    """By the expressions of the other routes (fusedamp.gradients, fusedamp.clip), bit for bit on the CPU."""
    grads, scale = some_grads(kind), torch.tensor(0.3)
    rows = addresses.rows(addresses.read(grads))
    for max_norm in (0.0, 1e-3, 1.0, 1e9, math.inf, math.nan):
        inv_scale, clip_coef, found_inf, norm, counts = OPS._check_grads(rows, scale, p, max_norm, None, wide)
        wanted_inverse = scale.double().reciprocal().float()
        bad, total, _, per_tensor = OPS._packed_grad_stats(rows, scale, wanted_inverse, p)
        wanted = total if p in (0.0, math.inf) else total.pow(1.0 / p)
        coefficient = (max_norm / (wanted + 1e-6)).clamp(max=1.0)
        assert same_bits(inv_scale, wanted_inverse)
        assert same_bits(found_inf, bad)
        assert same_bits(counts, per_tensor)
        if scale.is_cpu:
            assert same_numbers(norm, wanted if wide else wanted.float())
            assert same_numbers(clip_coef, coefficient.float())
        torch.testing.assert_close(norm, wanted if wide else wanted.float(), equal_nan=True)
        torch.testing.assert_close(clip_coef, coefficient.float(), equal_nan=True)
        for number in (inv_scale, clip_coef, found_inf, norm):
            assert number.shape == ()


@pytest.mark.parametrize("p", [2.0, 1.0, 0.5, 1 / 3, 0.25, 3.0, 7.5])
def test_norms_of_one_element(p):
    """Powers are rounded as torch rounds them, whatever the number is."""
    scale = torch.tensor(1.0)
    for value in torch.rand(50, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).tolist():
        grads = [torch.tensor([value], dtype=torch.float64)]
        rows = addresses.rows(addresses.read(grads))
        norm = OPS._check_grads(rows, scale, p, 1.0, None, True)[3]
        total = OPS._packed_grad_stats(rows, scale, None, p)[1]
        if scale.is_cpu:
            assert same_bits(norm, total.pow(1.0 / p))
        torch.testing.assert_close(norm, total.pow(1.0 / p))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [2.0**-126, 0.3, 65536.0, 3e38])
def test_check_with_max_norm_on_the_device(dtype, scale):
    grads, scale = some_grads("plain"), torch.tensor(scale)
    rows = addresses.rows(addresses.read(grads))
    for max_norm in (0.3, 1e4):
        limit = torch.tensor([max_norm], dtype=dtype)
        by_tensor = OPS._check_grads(rows, scale, 2.0, math.nan, limit)
        by_number = OPS._check_grads(rows, scale, 2.0, limit.item())
        assert all(map(same_bits, by_tensor, by_number))


def test_check_of_no_gradients():
    rows, scale = torch.zeros(3, 0, dtype=torch.int64, device="cpu"), torch.tensor(4.0)
    inv_scale, clip_coef, found_inf, norm, counts = OPS._check_grads(rows, scale, 2.0, 1.0)
    assert (inv_scale, clip_coef, found_inf, norm) == (0.25, 1, 0, 0)
    assert counts.shape == (0, 3)


def test_checks_that_are_refused():
    grads, scale = some_grads("plain"), torch.tensor(4.0)
    rows = addresses.rows(addresses.read(grads))
    with pytest.raises(RuntimeError, match=r"\[_check_grads\] scale is float64"):
        OPS._check_grads(rows, scale.double(), 2.0, 1.0)
    with pytest.raises(RuntimeError, match=r"\[_check_grads\] max_norm is int64"):
        OPS._check_grads(rows, scale, 2.0, 1.0, torch.tensor(1))
    with pytest.raises(RuntimeError, match=r"\[_check_grads\] max_norm has shape \[2\]"):
        OPS._check_grads(rows, scale, 2.0, 1.0, torch.ones(2))
    rows[2, 1] = 4
    with pytest.raises(RuntimeError, match=r"\[_check_grads\] rows\[1\] has dtype code 4"):
        OPS._check_grads(rows, scale, 2.0, 1.0)
