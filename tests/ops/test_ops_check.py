"""check_steps: what one of several calls, or all of them together, would be refused for, before any runs."""

import pytest
import torch
from fusedamp import ops
from fusedamp.ops import declaration
from on_device import DEVICE
from op_calls import VARIANTS, Unchanged, step_call
from test_ops_errors import ADAM, MASTERS, op_refusals


def as_call(call, monkeypatch):
    """Return the arguments that the op's wrapper passes to step_lists."""
    with monkeypatch.context() as patch:
        seen = []
        patch.setattr(
            declaration, "step_lists", lambda *args, **more: seen.append(ops.StepCall(*args, **more))
        )
        call.run()
    return seen[0]


def two_calls(monkeypatch, variants=("adamw", "sgd-momentum"), **options):
    made = [step_call(v, [(3,), (2, 3)], torch.bfloat16, masters=True, **options) for v in variants]
    return made, lambda: ops.check_steps([as_call(call, monkeypatch) for call in made])


@pytest.mark.parametrize("variant", VARIANTS)
def test_good_calls_pass_and_nothing_changes(variant, monkeypatch):
    made, check = two_calls(monkeypatch, (variant, "lion"))
    tensors = [t for call in made for t in call.tensors()]
    versions = [t._version for t in tensors]
    with Unchanged(tensors):
        check()
    assert [t._version for t in tensors] == versions
    ops.check_steps([])
    empty = as_call(step_call("sgd", [(3,)], torch.float32), monkeypatch)
    ops.check_steps([empty._replace(params=[], grads=[], steps=[], states={}, masters=[])])


@pytest.mark.parametrize("name", [*MASTERS, *ADAM])
def test_refuses_what_the_op_refuses_in_the_same_words(name, monkeypatch):
    """The last of two calls is wrong."""
    refusal, masters = (MASTERS | ADAM)[name], name not in ADAM
    good = as_call(step_call("sgd", [(3,)], torch.float32), monkeypatch)
    shapes, dtype = ([(4,), (4,)], torch.bfloat16) if masters else ([(2, 3)] * 3, torch.float32)
    call = step_call("adamw", shapes, dtype, masters=masters)
    tensors = call.tensors()
    refusal.change(call)
    check = lambda *args, **more: ops.check_steps([good, ops.StepCall(*args, **more)])  # noqa: E731
    monkeypatch.setattr(declaration, "step_lists", check)
    op_refusals.check(call.run, tensors, "adamw_", refusal)


def share(made, reader, reader_list, writer, writer_list):
    """Tensor 1 of a list becomes a view of tensor 1 of a list of the other call."""
    made[reader].lists()[reader_list][1] = made[writer].lists()[writer_list][1]


@pytest.mark.parametrize(
    ("one", "two"),
    [("grads", "params"), ("params", "params"), ("masters", "masters"), ("steps", "steps")],
)
@pytest.mark.parametrize("first", [0, 1])
def test_calls_share_no_memory_that_one_writes(one, two, first, monkeypatch):
    made, check = two_calls(monkeypatch)
    share(made, first, one, 1 - first, two)
    for call in made:  # each alone is fine
        ops.check_steps([as_call(call, monkeypatch)])
    with (
        Unchanged([t for call in made for t in call.tensors()]),
        pytest.raises(
            ValueError, match=r"^\[(adamw|sgd)_\] \w+\[1\] of call [01] \(shape .*\) shares memory"
        ) as caught,
    ):
        check()
    text = str(caught.value)
    assert f"{two}[1] of call {1 - first}" in text
    assert f"{one}[1] of call {first}" in text
    assert "expected memory of its own for all that the calls write" in text


def test_states_are_called_by_their_names(monkeypatch):
    made, check = two_calls(monkeypatch)
    made[1].lists()["momentum_buffers"][0] = made[0].lists()["exp_avg_sqs"][0]
    with pytest.raises(ValueError, match="shares memory") as caught:
        check()
    assert "exp_avg_sqs[0] of call 0" in str(caught.value)
    assert "momentum_buffers[0] of call 1" in str(caught.value)


def test_overlapping_views_of_other_calls_are_found(monkeypatch):
    made, check = two_calls(monkeypatch, ("sgd", "sgd"))
    memory = torch.zeros(8, dtype=torch.bfloat16)
    made[0].params[0], made[1].grads[0] = memory[:3], memory[2:5]
    with pytest.raises(ValueError, match=r"params\[0\] of call 0 .* shares memory with grads\[0\] of call 1"):
        check()
    made[1].grads[0] = memory[3:6]
    check()


def test_what_is_only_read_may_be_shared(monkeypatch):
    made, check = two_calls(monkeypatch)
    made[1].grads[1] = made[0].grads[1]
    check()


def test_fake_tensors_pass():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        tensors = [torch.zeros(3, device=DEVICE) for _ in range(3)]
        assert torch.ops.fusedamp._find_shared_memory(tensors, 1) == (-1, -1)
        scalars = dict(lr=0.1, hyper=[0.0] * 4)
        torch.ops.fusedamp._check_step(
            tensors[:1], tensors[1:2], [], [], tensors[2:], [], op="sgd_", **scalars
        )
