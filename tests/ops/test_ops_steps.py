"""Every step op against float64 references: every flag, dtype and size; scalars, skips and step
counts."""

import pytest
import torch
from op_calls import (
    BORDERS,
    DTYPES,
    HALVES,
    ROUNDOFF,
    VARIANTS,
    Unchanged,
    expected,
    same_bits,
    scalar,
    step_call,
)

NOT_ZERO = (1.0, 2.0, -1.0, 1e-40, float("inf"), float("nan"))


def check(call):
    """Runs the call and compares everything that it wrote with the reference."""
    wanted = [expected(call, i) for i in range(len(call.params))]
    steps = [float(s) for s in call.steps]
    with Unchanged(call.grads):
        call.run()
    for i, (weight, states) in enumerate(wanted):
        param = call.params[i]
        stepped = call.masters[i] if call.masters else param
        if stepped.element_size() == 2:  # rounded once more, to the weight's own dtype
            weight.error += ROUNDOFF[param.dtype] * weight.value.abs().clamp_min(
                torch.finfo(param.dtype).tiny
            )
        weight.check(stepped, f"weight {i}")
        for j, state in enumerate(states):
            state.check(call.states[j][i], f"state {j} of tensor {i}")
        assert float(call.steps[i]) == steps[i] + 1
        if call.masters:
            assert same_bits(param, call.masters[i].to(param.dtype))


SCALARS = dict(inv_scale=scalar(2.0**-7), clip_coef=scalar(0.37))


@pytest.mark.parametrize("masters", [False, True], ids=["no masters", "masters"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_follows_the_paper_in_every_dtype_and_size(variant, masters):
    """The arithmetic, around every border of lanes, blocks and chunks, with empty and 0-dim tensors among
    them."""
    shapes = [(), (0,), *((n,) for n in BORDERS), (3, 5, 7), (0, 4)]
    for dtype in HALVES if masters else DTYPES:
        check(step_call(variant, shapes, dtype, masters=masters, taken=(0, 1, 2, 40), **SCALARS))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("grad_dtype", DTYPES, ids=str)
def test_gradients_of_any_dtype(variant, grad_dtype):
    """Weights and gradients are paired in every mix; float64 gradients belong to float64 weights only."""
    dtypes = [torch.float64] if grad_dtype == torch.float64 else DTYPES
    check(step_call(variant, [(5,), (600,), (33, 3), (1,)], dtypes, grad_dtype=grad_dtype))
    if grad_dtype != torch.float64:
        check(step_call(variant, [(5,), (600,), (33, 3), (1,)], HALVES, grad_dtype=grad_dtype, masters=True))


@pytest.mark.parametrize(
    "variant", ["adamw", "adam-amsgrad", "sgd-momentum", "radam", "adagrad", "rmsprop-centered"]
)
def test_ten_thousand_steps_taken_and_extreme_hyperparameters(variant):
    """Bias corrections late in training, and options at their ends."""
    check(step_call(variant, [(100,)], torch.float32, taken=(10_000,)))
    check(step_call(variant, [(100,)], torch.float32, weight_decay=0.0, lr=0.0))
    if variant.startswith("rmsprop"):
        check(step_call(variant, [(100,)], torch.float32, alpha=0.5, eps=0.0))
    elif "betas" in VARIANTS[variant][1]:
        check(step_call(variant, [(100,)], torch.float32, betas=(0.0, 0.0), eps=0.0))
        check(step_call(variant, [(100,)], torch.float32, betas=(0.5, 0.99999), eps=1.0, taken=(0, 9)))


def test_beta_powers_do_not_drift():
    """Each step derives its bias correction from the step count: 50 steps in a row stay within one step's
    roundings."""
    call = step_call("adamw", [(200,)], torch.float32, taken=(0,))
    for _ in range(50):
        check(call)


@pytest.mark.parametrize("variant", ["adamw", "sgd-momentum", "lion", "adagrad", "rmsprop", "radam"])
@pytest.mark.parametrize("kind", ["float32", "float64", "0-dim", "integer-like float"])
def test_lr_tensor_equals_lr(variant, kind):
    """A tensor lr gives the same bits as an equal float."""
    value = 0.25 if kind == "integer-like float" else 0.03
    dtype = torch.float64 if kind == "float64" else torch.float32
    tensor = scalar(value, dtype) if kind == "0-dim" else torch.full((1,), value, dtype=dtype)
    by_float = step_call(variant, [(513,), ()], DTYPES, lr=tensor.item())
    by_tensor = by_float.clone()
    by_tensor.options["lr"] = tensor
    by_float.run()
    by_tensor.run()
    assert all(same_bits(a, b) for a, b in zip(by_float.tensors(), by_tensor.tensors(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("found", NOT_ZERO)
def test_skip_changes_nothing(variant, found):
    """Whatever is not 0 skips: not only 1, and NaN too. No weight, state, master or step count moves, to the
    bit."""
    for masters, dtypes in ((False, DTYPES), (True, HALVES)):
        call = step_call(variant, [(600,), (), (3, 3)], dtypes, masters=masters, found_inf=scalar(found))
        call.grads[0].fill_(float("nan"))
        if masters:
            call.params[0].mul_(2)  # a weight that its master would follow
        with Unchanged([*call.tensors(), call.options["found_inf"]]):
            call.run()


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_no_overflow_steps_as_without_the_flag(variant, zero):
    plain = step_call(variant, [(600,), ()], DTYPES)
    flagged = plain.clone()
    flagged.options["found_inf"] = torch.tensor([[zero]])
    plain.run()
    flagged.run()
    assert all(same_bits(a, b) for a, b in zip(plain.tensors(), flagged.tensors(), strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_inv_scale_and_clip_coef_multiply_the_gradient(variant):
    """One product of the two, then one with each gradient: the order that the contract states, checked to
    the bit."""
    inv_scale, clip_coef = scalar(1 / 3), torch.full((1, 1), 0.7)
    plain = step_call(variant, [(600,), ()], torch.float32)
    scaled = plain.clone()
    plain.grads = [g * (inv_scale * clip_coef).item() for g in plain.grads]
    scaled.options.update(inv_scale=inv_scale, clip_coef=clip_coef)
    plain.run()
    scaled.run()
    for a, b in zip(plain.params, scaled.params, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("variant", VARIANTS)
def test_each_tensor_counts_its_own_steps(variant):
    """A tensor stepped next to others with other counts equals the same tensor stepped alone."""
    together = step_call(variant, [(70,)] * 6, DTYPES, taken=(0, 5, 0, 2, 5, 1))
    alone = [together.clone() for _ in together.params]
    together.run()
    for i, call in enumerate(alone):
        for name in ("params", "grads", "steps"):
            setattr(call, name, getattr(call, name)[i : i + 1])
        call.states = [one[i : i + 1] for one in call.states]
        call.run()
        assert same_bits(call.params[0], together.params[i])
        assert same_bits(call.steps[0], together.steps[i])


@pytest.mark.parametrize("variant", VARIANTS)
def test_nothing_to_do(variant):
    """Empty lists and calls with only empty tensors are valid; the latter still count their steps."""
    step_call(variant, [], torch.float32).run()
    call = step_call(variant, [(0,), (3, 0)], HALVES, masters=True, taken=(0, 7))
    call.run()
    assert [float(s) for s in call.steps] == [1.0, 8.0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("last", [(0,), (0, 3), ()])
def test_an_empty_or_tiny_last_tensor_loses_no_update(variant, last):
    """Engines that launch when a table is full, or keep metadata of the last slot, fail here."""
    check(step_call(variant, [*[(9,)] * 70, (40_000,), last], DTYPES))
    check(step_call(variant, [(0,), (40_000,), (0,), (0,), (1,), last], DTYPES))


@pytest.mark.parametrize(
    "variant",
    ["adamw-amsgrad", "adam", "sgd-momentum", "lion", "adagrad", "rmsprop-centered-momentum", "radam"],
)
def test_nan_gradients_reach_the_weights_when_unchecked(variant):
    """Without found_inf nothing hides a NaN: it shows in the states and in the weights, and only at its
    place."""
    call = step_call(variant, [(700,)], torch.float16, masters=True)
    call.grads[0][130] = float("nan")
    call.run()
    for written in (call.params[0], call.masters[0], *(one[0] for one in call.states if one)):
        assert torch.nonzero(written.isnan()).flatten().tolist() == [130]


def test_a_nan_maximum_stays():
    """amsgrad's maximum of a NaN and a number is NaN, as torch.maximum has it."""
    call = step_call("adamw-amsgrad", [(700,)], torch.float32)
    call.states[2][0][130] = float("nan")
    call.run()
    for written in (call.params[0], call.states[2][0]):
        assert torch.nonzero(written.isnan()).flatten().tolist() == [130]
