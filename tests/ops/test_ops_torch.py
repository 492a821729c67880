"""The ops as torch sees them: schemas, fake tensors, compilation, autograd, inference mode."""

from unittest import mock

import pytest
import torch
from fusedamp import ops
from fusedamp.ops import library
from op_calls import HALVES, STATE_NAMES, VARIANTS, same_bits, scalar, step_call
from torch._subclasses.fake_tensor import FakeTensorMode

NUMBERS = (torch.float16, torch.bfloat16, torch.float32)


def raw_step(call):
    """Arguments of torch.ops.fusedamp.<op>: one flat list of states, hyperparameters in a list."""
    with mock.patch("fusedamp.ops.step.call") as seen:
        call.run()
    (_, *args), kwargs = seen.call_args
    return tuple(args), kwargs


def gradients():
    random = torch.Generator().manual_seed(0)
    return [torch.randn(n, generator=random).to(dtype) for n in (7, 0, 600) for dtype in NUMBERS]


def scale_arguments():
    return scalar(8.0), torch.zeros((), dtype=torch.int32), torch.ones((), dtype=torch.int32), scalar(1.0)


def numerics(due=1):
    return (
        torch.zeros(9, 3, dtype=torch.float64),
        torch.zeros(9, 64, dtype=torch.int64),
        scalar(due, torch.int32),
    )


SCALE_OPTIONS = dict(
    growth_factor=2.0,
    backoff_factor=0.5,
    growth_interval=3,
    min_scale=0.0,
    max_scale=1e9,
    hysteresis=1,
    refill_on_good_step=False,
)


def headroom_arguments():
    state = torch.zeros(ops.HEADROOM_STATE, dtype=torch.int32)
    return scalar(8.0), state, scalar(0.0), scalar(2.0**20, torch.float64)


HEADROOM_OPTIONS = dict(headroom_bits=2, growth_interval=3, min_scale=0.0, max_scale=1e9)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masters", [False, True])
def test_opcheck_steps(variant, masters):
    """Mutation annotations, fake kernels and AOT dispatch agree with what the op does."""
    call = step_call(variant, [(5,), (2, 3), ()], HALVES if masters else NUMBERS, masters=masters)
    call.options["found_inf"] = scalar(0.0)
    for more in ({}, updates(3)):
        call.options |= more
        args, kwargs = raw_step(call)
        assert more.keys() == kwargs.keys() & {"updates", "due"}
        torch.library.opcheck(getattr(torch.ops.fusedamp, call.op).default, args, kwargs)


def updates(count):
    due = torch.ones((), dtype=torch.int32)
    return dict(updates=torch.zeros(count, 4, dtype=torch.float64), due=due)


def test_compiled_updates_equal_eager_ones():
    results = []
    for run in (
        lambda call: call.run(),
        torch.compile(lambda call: call.run(), fullgraph=True, backend="aot_eager"),
    ):
        call = step_call("adamw", [(5,), (600,), ()], HALVES, masters=True)
        call.options |= updates(3)
        run(call)
        results.append([*call.tensors(), call.options["updates"]])
    assert all(map(same_bits, *results))
    assert (results[0][-1][:, 0] > 0).all()


def test_opcheck_the_others():
    torch.library.opcheck(torch.ops.fusedamp.unscale_.default, (gradients(), scalar(0.5), scalar(0.0)))
    torch.library.opcheck(torch.ops.fusedamp.grad_stats.default, (gradients(), scalar(0.5), 2.0))
    torch.library.opcheck(torch.ops.fusedamp.grad_stats.default, (gradients(),))
    options = dict(inv_scale=scalar(0.5), norm_type=1.0)
    for due in (0, 1):
        torch.library.opcheck(
            torch.ops.fusedamp.grad_numerics.default, (gradients(), *numerics(due)), options
        )
    torch.library.opcheck(torch.ops.fusedamp.update_scale_.default, scale_arguments(), SCALE_OPTIONS)
    torch.library.opcheck(
        torch.ops.fusedamp.update_scale_headroom_.default, headroom_arguments(), HEADROOM_OPTIONS
    )


@pytest.fixture(autouse=True)
def fresh_compiler():
    yield
    torch.compiler.reset()


def both(run, call, backend):
    """The call's tensors after an eager and after a compiled run from the same start."""
    eager, compiled = call.clone(), call.clone()
    run(eager)
    torch.compile(run, fullgraph=True, backend=backend)(compiled)
    return zip(eager.tensors(), compiled.tensors(), strict=True)


@pytest.mark.parametrize("variant", ["adamw-amsgrad", "adam", "sgd-nesterov", "lion", "rmsprop-centered"])
def test_compiled_steps_equal_eager_ones(variant):
    call = step_call(variant, [(5,), (600,), ()], HALVES, masters=True, inv_scale=scalar(0.25))
    for a, b in both(lambda call: call.run(), call, "aot_eager"):
        assert same_bits(a, b)


def two_passes(grads, inv_scale, found_inf, scale, tracker, state, *counted):
    stats = ops.grad_stats(grads, inv_scale)
    counts = ops.grad_numerics(grads, *counted, inv_scale=inv_scale).counts
    ops.unscale_(grads, inv_scale, found_inf)
    ops.update_scale_(
        scale, tracker, found_inf, growth_factor=2.0, backoff_factor=0.5, growth_interval=3, max_scale=1e9
    )
    ops.update_scale_headroom_(scale, state, found_inf, stats.total * 2.0**14, growth_interval=3)
    return stats.total.sqrt() * 2, counts.sum(0)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("bad", [0.0, float("nan")])
def test_compiled_passes_equal_eager_ones(backend, bad):
    """Checks, unscale_ and both updates of the scale in one graph, with and without an overflow."""
    results = []
    for run in (two_passes, torch.compile(two_passes, fullgraph=True, backend=backend)):
        arguments = [gradients(), scalar(0.5), scalar(0.0), scalar(8.0), torch.zeros((), dtype=torch.int32)]
        arguments.append(torch.zeros(ops.HEADROOM_STATE, dtype=torch.int32))
        arguments += numerics(due=int(bad == 0.0))
        arguments[0][0][3] = bad
        norm, counts = run(*arguments)
        results.append([*arguments[0], *arguments[1:], norm, counts])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
    assert results[1][-2].isnan().item() == (bad != 0.0)


@pytest.mark.slow
def test_inductor_step_equals_eager():
    call = step_call("adamw", [(5,), (600,)], HALVES, masters=True)
    for a, b in both(lambda call: call.run(), call, "inductor"):
        assert same_bits(a, b)


@pytest.mark.parametrize("variant", ["adamw-amsgrad", "adam", "sgd-momentum"])
def test_version_counters_move(variant):
    """Everything written moves by at least one, gradients do not; autograd relies on it."""
    call = step_call(variant, [(5,), (0,)], HALVES, masters=True)
    written = [t for name, tensors in call.lists().items() if name != "grads" for t in tensors]
    before = [t._version for t in written]
    reads = [g._version for g in call.grads]
    call.run()
    assert all(t._version > v for t, v in zip(written, before, strict=True))
    assert [g._version for g in call.grads] == reads


def test_version_counters_of_the_others_move():
    grads, found_inf, inv_scale = gradients(), scalar(0.0), scalar(0.5)
    ops.unscale_(grads, inv_scale, found_inf)
    assert all(t._version for t in (*grads, found_inf))
    ops.grad_stats(grads, inv_scale)
    assert inv_scale._version == 0
    scale, tracker, budget, found_inf = scale_arguments()
    ops.update_scale_(scale, tracker, found_inf, hysteresis_tracker=budget, **SCALE_OPTIONS)
    assert scale._version
    assert tracker._version
    assert budget._version
    assert not found_inf._version
    scale, state, found_inf, largest = headroom_arguments()
    ops.update_scale_headroom_(scale, state, found_inf, largest, **HEADROOM_OPTIONS)
    assert scale._version
    assert state._version
    assert not found_inf._version
    assert not largest._version


def test_backward_after_a_step_notices_the_changed_weight():
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * weight).sum()
    with torch.no_grad():
        ops.sgd_([weight], [torch.ones(3)], [], [], [scalar(0.0)], lr=0.1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_backward_after_unscale_notices_the_changed_gradient():
    x, g = torch.ones(3, requires_grad=True), torch.ones(3)
    product = (x * g).sum()
    ops.unscale_([g], scalar(0.5), scalar(0.0))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_modes(mode):
    """The same bits whatever the mode; tensors made in inference mode have no version counter, which is
    fine."""
    expected = step_call("adamw", [(5,)], torch.float16, masters=True)
    expected.run()
    with mode():
        call = step_call("adamw", [(5,)], torch.float16, masters=True)
        call.run()
        assert ops.grad_stats(call.grads).counts.sum() == 0
        ops.unscale_(call.grads, scalar(0.5), scalar(0.0))
    assert all(same_bits(a, b) for a, b in zip(expected.masters, call.masters, strict=True))
    call.run()  # inference tensors outside the mode


def test_parameters_that_require_grad_step_without_a_graph():
    weight = torch.nn.Parameter(torch.ones(3))
    ops.sgd_([weight], [torch.ones(3)], [], [], [scalar(0.0)], lr=0.5)
    assert weight.tolist() == [0.5] * 3
    assert weight.grad_fn is None
    assert weight.is_leaf


def test_fake_tensors_have_the_shapes_of_real_ones():
    real = ops.grad_stats(gradients(), scalar(0.5))
    with FakeTensorMode() as mode:
        grads = [mode.from_tensor(g) for g in gradients()]
        fake = ops.grad_stats(grads, mode.from_tensor(scalar(0.5)))
        counting = ops.grad_numerics(grads, *map(mode.from_tensor, numerics()))
        ops.unscale_(grads, mode.from_tensor(scalar(0.5)), mode.from_tensor(scalar(0.0)))
        call = step_call("adamw", [(5,), (2, 3)], torch.float32)
        call.map(mode.from_tensor).run()
    for a, b in zip(real * 2, fake + counting, strict=True):
        assert (a.shape, a.dtype, a.device, a.stride()) == (b.shape, b.dtype, b.device, b.stride())


def test_schemas_say_what_is_written():
    for op in STATE_NAMES:
        arguments = getattr(torch.ops.fusedamp, op).default._schema.arguments
        written = {a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write}
        assert written == {"params", "masters", "states", "steps", "scales", "updates"}
    for op in ("grad_numerics", "_packed_grad_numerics", "_check_numerics"):
        arguments = getattr(torch.ops.fusedamp, op).default._schema.arguments
        assert {a.name for a in arguments if a.alias_info is not None} == {"extremes", "histogram"}


def test_a_build_that_is_older_than_the_python_files_is_named():
    with pytest.raises(ImportError, match=r"have no op gone_: .*: `pip install \.`"):
        library._register_fake("gone_", lambda: None)
