"""Step ops refuse wrong ``updates`` and ``due``, in words, before any change."""

import op_refusals
import pytest
import torch
from fusedamp import ops
from op_calls import Unchanged, scalar, step_call
from op_refusals import NO_DATA, bad_type, bad_value, freed, option
from step_tables import grads_of, groups_of, rows_of

DOUBLE, INT = torch.float64, torch.int32


def tally(*shape, dtype=DOUBLE):
    return torch.full(shape or (3, 4), 5, dtype=dtype)


def as_view(name, index, dtype=DOUBLE):
    """The updates lie in the memory of a tensor of the call, which has room for them."""

    def change(call):
        call.lists()[name][index] = torch.zeros(6, 4)
        memory = call.lists()[name][index]
        call.options["updates"] = memory.view(dtype).view(3, 4)

    return change


def due_inside_of_updates(call):
    call.options |= dict(updates=tally(), due=None)
    call.options["due"] = call.options["updates"].view(INT)[0, :1]


def due_is_a_step(call):
    call.options |= dict(updates=tally(), due=call.steps[1].view(INT))


def shared_with(name, dtype=torch.float32):
    """A scalar that the step reads lies in the updates."""

    def change(call):
        updates = call.options["updates"] = tally()
        call.options[name] = updates.view(dtype)[1, :1]

    return change


EXPECTED = "expected contiguous float64 [3, 4]"
UPDATES = {
    "float32": bad_value(
        option(updates=tally(dtype=torch.float32)), "updates is float32 of shape [3, 4]", EXPECTED
    ),
    "few": bad_value(option(updates=tally(2, 4)), "updates is float64 of shape [2, 4]", EXPECTED),
    "flat": bad_value(option(updates=tally(12)), "updates is float64 of shape [12]", EXPECTED),
    "transposed": bad_value(option(updates=tally(4, 3)), "updates is float64 of shape [4, 3]", EXPECTED),
    "3-dim": bad_value(option(updates=tally(3, 4, 1)), "updates is float64 of shape [3, 4, 1]", EXPECTED),
    "strides": bad_value(option(updates=tally(4, 3).t()), "[3, 4] and strides [1, 3]", EXPECTED),
    "gaps": bad_value(option(updates=tally(3, 5)[:, :4]), "[3, 4] and strides [5, 1]", EXPECTED),
    "list": bad_type(option(updates=[1.0]), "updates is a list; expected a tensor"),
    "meta": bad_value(option(updates=tally().to("meta")), "updates is " + NO_DATA),
    "sparse": bad_value(option(updates=tally().to_sparse()), "updates is sparse", ".to_dense()"),
    "freed": bad_value(option(updates=freed(tally())), "updates (shape [3, 4]) has no memory", "freed?"),
    "in a weight": bad_value(as_view("params", 0), "shares memory with"),
    "in a gradient": bad_value(as_view("grads", 0), "updates (shape [3, 4]) shares memory with grads[0]"),
    "in a state": bad_value(as_view("exp_avgs", 0), "shares memory with"),
    "inv_scale in it": bad_value(
        shared_with("inv_scale"), "updates (shape [3, 4]) shares memory with inv_scale"
    ),
    "clip_coef in it": bad_value(shared_with("clip_coef"), "shares memory with clip_coef"),
    "found_inf in it": bad_value(shared_with("found_inf"), "shares memory with found_inf"),
    "lr in it": bad_value(shared_with("lr"), "updates (shape [3, 4]) shares memory with lr"),
    "due in it": bad_value(due_inside_of_updates, "updates (shape [3, 4]) shares memory with due"),
    "due is a step": bad_value(due_is_a_step, "steps[1] (shape []) shares memory with due"),
    "due alone": bad_value(
        option(due=torch.tensor(1, dtype=INT)),
        "due is given without updates; expected both, or updates alone. Pass updates",
    ),
    "int64 due": bad_value(
        option(updates=tally(), due=torch.tensor(1)), "due is int64 of shape []; expected one int32 element"
    ),
    "bool due": bad_value(
        option(updates=tally(), due=torch.tensor(True)), "due is Bool of shape []; expected one int32"
    ),
    "long due": bad_value(
        option(updates=tally(), due=torch.ones(2, dtype=INT)), "due is int32 of shape [2]; expected one int32"
    ),
    "number": bad_type(option(updates=tally(), due=1), "due is a int; expected a tensor"),
    "meta due": bad_value(
        option(updates=tally(), due=torch.ones((), dtype=INT, device="meta")), "due is " + NO_DATA
    ),
}


@pytest.mark.parametrize("op", ["adamw", "radam"])
@pytest.mark.parametrize("name", UPDATES)
def test_refusals(name, op):
    call = step_call(op, [(6, 4)] * 3, torch.float32)
    UPDATES[name].change(call)
    given = [t for t in call.options.values() if isinstance(t, torch.Tensor)]
    readable = [t for t in given if not t.is_meta and not t.is_sparse and t.is_contiguous() and t.numel()]
    readable = [t for t in readable if t.untyped_storage().nbytes()]
    op_refusals.check(call.run, [*call.tensors(), *readable], f"{op}_", UPDATES[name])


def lamb_with(squares, updates):
    hyper = dict(zip(ops.step.HYPER["lamb_"], (0.9, 0.99, 1e-8, 0.1, 1.0, 1.0, 1.0), strict=True))
    moments = {"exp_avgs": [torch.zeros(3)], "exp_avg_sqs": [torch.zeros(3)]}
    scalars = ops.step_scalars("lamb_", torch.device("cpu"), 0.1, hyper)
    ops.step_lists(
        "lamb_", [torch.ones(3)], [torch.ones(3)], [], moments, [scalar(0.0)], scalars, squares=squares,
        updates=updates,
    )  # fmt: skip


def test_norms_in_the_updates():
    updates = torch.ones(1, 4, dtype=DOUBLE)
    with pytest.raises(ValueError, match=r"\[lamb_\] updates .* shares memory with squares"):
        lamb_with(updates[:, :2], updates)


def test_calls_that_write_the_same_updates_or_read_due_there():
    """Guards check_steps: what one call writes, another may neither write nor read."""

    def call(updates, due=None):
        one = step_call("sgd", [(3,)], torch.float32)
        scalars = ops.step_scalars(
            "sgd_", torch.device("cpu"), 0.1, dict.fromkeys(ops.step.HYPER["sgd_"], 0.0)
        )
        return ops.StepCall(
            "sgd_", one.params, one.grads, [], {}, one.steps, scalars, updates=updates, due=due
        )

    one, other = tally(1, 4), tally(1, 4)
    ops.check_steps([call(one), call(other, due=torch.ones((), dtype=INT))])
    with pytest.raises(ValueError, match=r"updates of call 1 .* shares memory with updates of call 0"):
        ops.check_steps([call(one), call(one)])
    with pytest.raises(ValueError, match=r"updates of call 0 .* shares memory with due of call 1"):
        ops.check_steps([call(one), call(other, due=one.view(INT)[0, :1])])
    with pytest.raises(ValueError, match=r"\[sgd_\] updates is float64 of shape \[2, 4\]"):
        ops.check_steps([call(tally(2, 4))])


def test_planned_steps():
    """Guards the op on addresses: a row of updates for every row of the table, over all groups."""
    from test_planned_ops import made

    groups = [made("adamw_", sizes=(3, 4)), made("sgd_", sizes=(3,))]
    tables = rows_of(groups), grads_of(groups), groups_of(groups), groups[0].params[0]
    step = torch.ops.fusedamp._planned_step_
    due = torch.ones((), dtype=INT)
    wrong = {
        r"updates is float64 of shape \[2, 4\].*expected contiguous float64 \[3, 4\]": dict(
            updates=tally(2, 4), due=due
        ),
        r"updates is float32": dict(updates=tally(dtype=torch.float32)),
        r"due is int64": dict(updates=tally(), due=torch.tensor(1)),
        r"due is given without updates": dict(due=due),
    }
    for text, given in wrong.items():
        with (
            Unchanged([t for group in groups for t in group.changed()]),
            pytest.raises(RuntimeError, match=rf"\[adamw_\] {text}"),
        ):
            step(*tables, **given)
