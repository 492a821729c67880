"""Masters: params == round(master) bit for bit after every step, and masters follow weights that were
modified."""

import pytest
import torch
from op_calls import HALVES, VARIANTS, bits, same_bits, same_numbers, scalar, step_call
from storage_reference import followed

STILL = dict(lr=0.0, weight_decay=0.0)


def assert_rounded(call):
    for param, master in zip(call.params, call.masters, strict=True):
        assert same_numbers(param, master.to(param.dtype))


def every_half(dtype):
    """All 2^16 values of a 16-bit type."""
    return torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("magnitude", [1e-8, 1e-3, 1.0, 3e4], ids=str)
def test_weights_are_rounded_masters_over_many_steps(variant, magnitude):
    call = step_call(variant, [(700,), (3, 5), (), (0,)], HALVES, masters=True)
    for param, master in zip(call.params, call.masters, strict=True):
        param.copy_(master.mul_(magnitude))
    for _ in range(20):
        call.run()
        assert_rounded(call)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_small_steps_add_up(dtype):
    """1000 steps of 1e-4 from 1.0: each is lost in 16 bits, all of them arrive through the master."""
    call = step_call("sgd", [(3,)], dtype, masters=True, lr=1e-4, weight_decay=0.0)
    for t in (*call.params, *call.masters, *call.grads):
        t.fill_(1.0)
    for _ in range(1000):
        call.run()
    # Each step rounds once, by at most 2^-25 (numbers in [0.5, 1)), and lr itself is rounded once.
    assert (call.masters[0].double() - 0.9).abs().max() < 1000 * (2.0**-25 + 1e-4 * 2.0**-24)
    assert same_bits(call.params[0], call.masters[0].to(dtype))


@pytest.mark.parametrize("variant", ["adamw", "adam-amsgrad", "sgd", "sgd-momentum"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_follow_every_value_that_a_weight_can_have(variant, dtype):
    """A weight that was written, whatever to (-0.0, subnormals, NaNs), is what the step starts from."""
    written = every_half(dtype)
    written = written[~written.isinf()]  # a product of 0 and infinity is NaN
    call = step_call(variant, [written.shape], dtype, masters=True, **STILL)
    call.params[0].copy_(written)
    call.masters[0].fill_(-7.0)  # the rounding of none of them but itself
    call.grads[0].fill_(1.0)
    call.run()
    if variant == "sgd":  # its update here is -0.0, which changes nothing; decay by 0 turns -0.0 into 0.0
        assert same_numbers(call.masters[0], written.float())
    torch.testing.assert_close(call.masters[0], written.float(), rtol=0, atol=0, equal_nan=True)
    assert_rounded(call)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_follow_a_written_infinity(dtype):
    call = step_call("adamw", [(600,)], dtype, masters=True, **STILL)
    call.params[0][7], call.params[0][599] = float("inf"), float("-inf")
    call.masters[0][[7, 599]] = 1.5  # no remainder: one below 0 would make infinity finite
    call.run()
    assert torch.nonzero(~call.params[0].isfinite()).flatten().tolist() == [7, 599]
    assert torch.nonzero(~call.masters[0].isfinite()).flatten().tolist() == [7, 599]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_an_untouched_weight_keeps_its_masters_low_bits(dtype):
    """A master that rounds to the weight stays, bit for bit: also ties, where its neighbor would round
    elsewhere."""
    upper = every_half(dtype).float()
    upper = upper[upper.isfinite()]
    masters = torch.cat(
        [bits(upper).add(low).view(torch.float32) for low in (0, 1, 0xFFF, 0x1000, 0x1001, 0x7FFF)]
    )
    masters = masters[masters.isfinite()]
    call = step_call("sgd", [(masters.numel(),)], dtype, masters=True, **STILL)
    call.masters[0], call.params[0] = masters.clone(), masters.to(dtype)
    weights = call.params[0].clone()
    call.run()
    assert same_bits(call.masters[0], masters)
    assert same_bits(call.params[0], weights)


@pytest.mark.parametrize("place", [0, 1, 15, 16, 511, 512, 513, 32_767, 32_768, 32_800])
def test_follows_elementwise(place):
    """One written weight: its master follows, its neighbors keep what 16 bits cannot hold."""
    call = step_call("adamw", [(32_801,)], torch.bfloat16, masters=True, **STILL)
    call.params[0][place] = 2.5
    expected = call.masters[0].clone()
    expected[place] = followed(call.masters[0], call.params[0])[place]
    assert 0 < abs(expected[place].item() - 2.5) < 2.0**-7  # less than half a unit
    call.run()
    assert same_bits(call.masters[0], expected)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_written_weight_steps_as_a_fresh_one(variant):
    """After load_state_dict or clamp_ the step equals that of a call with updated masters."""
    written = step_call(variant, [(600,), (3, 3)], HALVES, masters=True)
    for param in written.params:
        param.clamp_(-0.5, 0.5)
    fresh = written.clone()
    fresh.masters = [followed(m, p) for m, p in zip(fresh.masters, fresh.params, strict=True)]
    written.run()
    fresh.run()
    assert all(same_bits(a, b) for a, b in zip(written.tensors(), fresh.tensors(), strict=True))
    assert_rounded(written)


def test_weights_that_overflow_become_infinite_not_wrong():
    """A step past float16's end: the master stays finite, the weight is its rounding, inf, and nothing is
    followed back."""
    call = step_call("sgd", [(4,)], torch.float16, masters=True, lr=1.0, weight_decay=0.0)
    call.params[0].fill_(60_000.0)
    call.masters[0].fill_(60_000.0)
    call.grads[0].fill_(-10_000.0)
    call.run()
    assert call.params[0].isinf().all()
    assert call.masters[0].eq(70_000.0).all()
    call.grads[0].fill_(10_000.0)
    call.run()
    assert call.params[0].eq(60_000.0).all()


def test_nan_masters_with_nan_weights_stay_nan():
    """torch's NaN has another payload than ours may have: no endless following, no -0.0, no infinity."""
    for dtype in HALVES:
        call = step_call("sgd", [(4,)], dtype, masters=True, **STILL)
        payloads = torch.tensor([0x7FFFFFFF, 0x7F800001, -1, 0x7FC00000]).to(torch.int32).view(torch.float32)
        call.masters[0] = payloads.clone()
        call.params[0] = payloads.to(dtype)
        for _ in range(2):
            call.run()
            assert call.params[0].isnan().all()
            assert call.masters[0].isnan().all()


def test_inv_scale_and_skip_with_masters():
    """Scaled float16 gradients: the weights move as they do with unscaled float32 gradients of the same
    values."""
    scaled = step_call("adamw", [(600,)], torch.float16, masters=True)
    plain = scaled.clone()
    scaled.grads = [g.clamp(-1, 1) * 1024 for g in scaled.grads]
    plain.grads = [g.float() / 1024 for g in scaled.grads]
    scaled.options.update(inv_scale=scalar(1 / 1024), found_inf=scalar(0.0))
    scaled.run()
    plain.run()
    assert same_bits(scaled.masters[0], plain.masters[0])
    assert same_bits(scaled.params[0], plain.params[0])
