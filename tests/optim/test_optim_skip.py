"""All or nothing: a step whose found_inf is set changes nothing, bit for bit; else unscaling is part of
the step.
"""

import pytest
import torch
from cases import BY_NAME, CASES, COMPOSED, MAIN, bits, make_params, set_grads
from fusedamp.ops.inputs import AmpInputs, DeviceInputs
from on_device import HERE

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def amp(found_inf: float, inv_scale: float = 1.0, clip_coef: float | None = None) -> AmpInputs:
    clip = None if clip_coef is None else torch.tensor(clip_coef)
    return AmpInputs({HERE: DeviceInputs(torch.tensor(inv_scale), clip, torch.tensor(found_inf))})


def step(optimizer, inputs: AmpInputs) -> None:
    optimizer._amp = inputs
    try:
        optimizer.step()
    finally:
        optimizer._amp = None


def everything(optimizer) -> list:
    """The bits of all that a step may change, and of the gradients, which it may not."""
    tensors = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            tensors += [param, param.grad, *optimizer.state.get(param, {}).values()]
    return [bits(t) for t in tensors if t is not None]


@pytest.mark.parametrize("found_inf", [1.0, 2.0, float("inf")])
@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_skipped_step_changes_nothing(case, found_inf):
    """Guards all-or-nothing over groups and dtypes, for every value of the flag that is not 0."""
    params = [p for dtype in DTYPES for p in make_params(dtype)]
    optimizer = case.ours([{"params": params[::2]}, {"params": params[1::2], "lr": 0.5}], **case.options)
    set_grads(params, 0)
    optimizer.step()
    set_grads(params, 1)
    for param in params:
        param.grad.fill_(float("nan"))
    before = everything(optimizer)
    step(optimizer, amp(found_inf))
    assert everything(optimizer) == before


@pytest.mark.parametrize("case", CASES, ids=str)
def test_overflow_on_the_first_step_leaves_no_trace(case):
    """Guards torch's fused SGD defect (uninitialized buffer), step counts and masters after a first
    overflow.
    """
    skipped, clean = ([p for dtype in DTYPES for p in make_params(dtype)] for _ in range(2))
    optimizer, expected = case.ours(skipped, **case.options), case.ours(clean, **case.options)
    for param in skipped:
        param.grad = torch.full_like(param, float("inf"))
    before = [bits(p) for p in skipped]
    step(optimizer, amp(1.0))
    assert [bits(p) for p in skipped] == before
    for s in range(2):
        set_grads(skipped, s)
        set_grads(clean, s)
        optimizer.step()
        expected.step()
    assert everything(optimizer) == everything(expected)


def test_overflow_does_not_count_for_later_groups():
    """Guards the step count: torch counts an overflowed first step for all groups but the first."""
    params = make_params(torch.float32)
    optimizer = BY_NAME["adamw"].ours([{"params": [p]} for p in params])
    set_grads(params, 0)
    step(optimizer, amp(1.0))
    assert [optimizer.state[p]["step"].item() for p in params] == [0.0] * len(params)
    step(optimizer, amp(0.0))
    assert [optimizer.state[p]["step"].item() for p in params] == [1.0] * len(params)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_unscaling_in_the_step_is_exact(case):
    """Guards inv_scale and clip_coef: powers of two give the bits of the unscaled step; gradients stay
    scaled.
    """
    scaled, plain = ([p for dtype in DTYPES for p in make_params(dtype)] for _ in range(2))
    optimizer, expected = case.ours(scaled, **case.options), case.ours(plain, **case.options)
    for s in range(3):
        set_grads(plain, s)
        expected.step()
        for p, q in zip(scaled, plain, strict=True):
            p.grad_dtype = None if p.dtype == torch.float64 else torch.float32  # room for the scaled values
            p.grad = q.grad.to(p.grad_dtype or p.dtype) * 2.0**16
        before = [bits(p.grad) for p in scaled]
        step(optimizer, amp(0.0, inv_scale=2.0**-14, clip_coef=0.25))
        assert [bits(p.grad) for p in scaled] == before
    for p, q in zip(scaled, plain, strict=True):
        assert torch.equal(p, q)
        for name, value in optimizer.state[p].items():
            assert torch.equal(value, expected.state[q][name])


def test_gradients_that_the_scaler_did_not_see_are_refused():
    """Guards against a step with scaled gradients: a device without inputs is an error, before anything
    moves.
    """
    params = make_params(torch.float32)
    optimizer = BY_NAME["sgd"].ours(params)
    set_grads(params, 0)
    before = [bits(p) for p in params]
    with pytest.raises(RuntimeError, match=rf"has gradients on {HERE}; expected only \['cuda:7'\]"):
        step(optimizer, AmpInputs({torch.device("cuda:7"): DeviceInputs()}))
    assert [bits(p) for p in params] == before
    assert optimizer._amp is None


def test_momentum_switched_on_later_starts_from_the_gradient():
    """Guards SGD's step count: with dampening, a buffer that starts late starts as torch's does."""
    case = BY_NAME["sgd-dampening"]
    ours, theirs = make_params(torch.float32), make_params(torch.float32)
    optimizers = [case.ours(ours, lr=0.1), case.torch(theirs, lr=0.1)]
    for s in range(6):
        if s == 3:
            for optimizer in optimizers:
                optimizer.param_groups[0].update(momentum=0.9, dampening=0.5)
        set_grads(ours, s)
        set_grads(theirs, s)
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=6 * 8 * 6e-8, atol=6 * 8 * 6e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_zero_learning_rate_and_gradients_move_nothing(case):
    """Guards the step that torch.distributed.checkpoint makes to create state; stock Adam gives NaN in
    FP16.
    """
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        params = make_params(dtype)
        before = [bits(p) for p in params]
        optimizer = case.ours(params, **{**case.options, "lr": torch.tensor(0.0)})
        for p in params:
            p.grad = torch.zeros_like(p)
        optimizer.step(closure=None)
        assert [bits(p) for p in params] == before
        assert len(optimizer.state) == len(params)
