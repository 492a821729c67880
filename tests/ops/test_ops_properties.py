"""Random arguments, good and bad: no crash, only documented errors, and a call that raises has changed
nothing."""

import pytest
import torch
from fusedamp import ops
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from op_calls import DTYPES, STATE_NAMES, VARIANTS, Unchanged, same_bits, scalar, step_call
from op_refusals import freed, meta, with_gaps

DOCUMENTED = (ValueError, TypeError, NotImplementedError)
quick = settings(
    max_examples=120, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)

shapes = st.lists(st.lists(st.integers(0, 5), max_size=4).map(tuple), max_size=4)
dtypes = st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4)
junk = st.sampled_from(
    [None, 1.0, "text", b"", [], {}, torch, torch.float32, torch.zeros(2), torch.zeros(0), float("nan"), -1]
)
spoils = st.sampled_from(
    [
        meta,
        freed,
        with_gaps,
        torch.Tensor.int,
        torch.Tensor.double,
        torch.Tensor.half,
        torch.Tensor.to_sparse,
        lambda t: t + 0j,
        lambda t: t.unsqueeze(0),
        lambda t: t.flatten(),
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
        lambda t: t.expand(2, *t.shape),
        lambda t: None,
        lambda t: [t],
        lambda t: t.tolist(),
    ]
)


def whole(tensors):
    """Variants with bitwise reproducible results."""
    plain = [
        t for t in tensors if isinstance(t, torch.Tensor) and t.layout is torch.strided and not t.is_meta
    ]
    return [t for t in plain if t.untyped_storage().size() and t.element_size() > 1 and not t.is_complex()]


def run_unchanged_on_error(run, tensors):
    """Runs it; every error is a documented one that names the op, and then nothing has changed."""
    unchanged = Unchanged(whole(tensors))
    try:
        run()
        return
    except DOCUMENTED as error:
        complaint = str(error)
    unchanged.__exit__()
    assert complaint.startswith("["), complaint


@quick
@given(st.sampled_from(list(VARIANTS)), shapes, dtypes, st.booleans(), st.integers(0, 3))
def test_good_steps_run(variant, shapes, dtypes, masters, taken):
    """Any list of shapes and dtypes steps, and gives each tensor what it gets alone."""
    if masters:
        dtypes = [d for d in dtypes if d.itemsize == 2] or [torch.float16]
    call = step_call(variant, shapes, dtypes, masters=masters, taken=(taken,))
    again = call.clone()
    call.run()
    for i in reversed(range(len(shapes))):
        one = again.clone()
        for tensors in one.lists().values():
            tensors[:] = tensors[i : i + 1]
        one.run()
        assert same_bits(one.params[0], call.params[i])


@quick
@given(
    st.sampled_from(list(VARIANTS)),
    shapes.filter(bool),
    dtypes,
    st.booleans(),
    st.lists(
        st.tuples(st.sampled_from(["spoil", "drop", "repeat", "clear"]), spoils), min_size=1, max_size=3
    ),
    st.randoms(use_true_random=False),
)
def test_spoiled_lists(variant, shapes, dtypes, masters, damages, random):
    """Tensors replaced by wrong ones, lists of wrong length, tensors given twice."""
    call = step_call(variant, shapes, dtypes, masters=masters)
    originals = call.tensors()
    for kind, spoil in damages:
        tensors = random.choice([tensors for tensors in call.lists().values() if tensors] or [[]])
        if not tensors:
            continue
        index = random.randrange(len(tensors))
        if (
            kind == "spoil"
            and isinstance(tensors[index], torch.Tensor)
            and tensors[index].layout is torch.strided
        ):
            try:
                tensors[index] = spoil(tensors[index])
            except (RuntimeError, NotImplementedError):
                continue  # torch itself cannot make this one
        elif kind == "drop":
            tensors.pop(index)
        elif kind == "repeat":
            tensors.append(tensors[index])
        elif kind == "clear":
            tensors.clear()
    run_unchanged_on_error(call.run, originals)


@quick
@given(st.sampled_from(list(VARIANTS)), st.data())
def test_junk_for_any_argument(variant, data):
    call = step_call(variant, [(2, 3), ()], torch.float32)
    call.options.update(inv_scale=scalar(1.0), clip_coef=scalar(1.0), found_inf=scalar(0.0))
    originals = call.tensors()
    fields = ["params", "grads", "masters", "steps", *call.options]
    for name in data.draw(st.lists(st.sampled_from(fields), min_size=1, max_size=2)):
        value = data.draw(junk)
        if name in call.options:
            call.options[name] = value
        else:
            setattr(call, name, value)
    run_unchanged_on_error(call.run, originals)


@quick
@given(
    shapes, dtypes, st.lists(st.tuples(st.integers(0, 3), spoils), max_size=2), junk, junk, st.integers(0, 5)
)
def test_gradient_ops(shapes, dtypes, damages, inv_scale, norm_type, which):
    """unscale_ and grad_stats with spoiled gradients and, now and then, junk for the rest."""
    random = torch.Generator().manual_seed(0)
    grads = [torch.randn(s, generator=random).to(dtypes[i % len(dtypes)]) for i, s in enumerate(shapes)]
    originals = list(grads)
    for place, spoil in damages:
        if (
            place < len(grads)
            and isinstance(grads[place], torch.Tensor)
            and grads[place].layout is torch.strided
        ):
            try:
                grads[place] = spoil(grads[place])
            except (RuntimeError, NotImplementedError):
                continue
    inverse = inv_scale if which == 0 else scalar(0.5)
    with Unchanged(whole(originals)):
        run_unchanged_on_error(lambda: ops.grad_stats(grads, inverse, norm_type if which == 1 else 2.0), [])
    run_unchanged_on_error(lambda: ops.unscale_(grads, inverse, scalar(0.0)), originals)


@quick
@given(st.data())
def test_update_scale(data):
    tensors = dict(
        scale=scalar(8.0), growth_tracker=torch.zeros((), dtype=torch.int32), found_inf=scalar(1.0)
    )
    arguments = tensors | dict(growth_factor=2.0, backoff_factor=0.5, growth_interval=3, hysteresis=1)
    arguments |= dict(min_scale=0.0, max_scale=1e9, hysteresis_tracker=None, refill_on_good_step=False)
    name = data.draw(st.sampled_from(list(arguments)))
    run_unchanged_on_error(
        lambda: ops.update_scale_(**(arguments | {name: data.draw(junk)})), tensors.values()
    )


@quick
@given(st.data())
def test_update_scale_headroom(data):
    state = torch.zeros(ops.HEADROOM_STATE, dtype=torch.int32)
    tensors = dict(scale=scalar(8.0), state=state, found_inf=scalar(1.0), largest=scalar(1.0, torch.float64))
    arguments = tensors | dict(headroom_bits=2, growth_interval=3, min_scale=0.0, max_scale=1e9)
    name = data.draw(st.sampled_from(list(arguments)))
    run_unchanged_on_error(
        lambda: ops.update_scale_headroom_(**(arguments | {name: data.draw(junk)})), tensors.values()
    )


@pytest.mark.parametrize("op", STATE_NAMES)
def test_missing_arguments_are_python_errors(op):
    with pytest.raises(TypeError, match=op):
        getattr(ops, op)()
