"""Masters of weights that were modified, in FP32 and in split form: the master keeps its remainder where that
fits the new weight."""

import pytest
import torch
from fusedamp import ops, optim
from fusedamp.ops import recode
from on_device import HERE
from op_calls import HALVES, same_bits, same_numbers, scalar, split_masters
from storage_reference import followed
from test_ops_masters import every_half

REMAINDERS = 16  # of each weight


def stepped(weights, masters):
    """The masters after a step that changes nothing, of weights that were modified; FP32 numbers."""
    weights, masters = weights.clone(), masters.clone()
    ops.sgd_([weights], [torch.ones_like(weights)], [], [masters], [scalar(0.0)], lr=0.0)
    if masters.dtype == torch.int16:
        return recode.master_of(weights, masters)
    assert same_numbers(weights, masters.to(weights.dtype))
    return masters


def masters_of(dtype):
    """FP32 masters with split remainders, none of them a tie, with all 16-bit weights in another order."""
    random = torch.Generator().manual_seed(0)
    old = every_half(dtype).repeat(REMAINDERS)[torch.randperm(REMAINDERS * 2**16, generator=random)]
    most = 2**15 if dtype == torch.bfloat16 else 2**14  # half a unit
    remainders = torch.randint(1 - most, most, old.shape, generator=random).to(torch.int16)
    remainders[:1000], remainders[1000:2000], remainders[2000:3000] = 0, 1 - most, most - 1
    masters = recode.master_of(old, remainders)
    new = every_half(dtype).repeat(REMAINDERS)
    # Those that split masters represent exactly. (FP16 loses digits below 2^-16.)
    exact = (masters.to(dtype) == old) & masters.isfinite()
    if dtype == torch.float16:
        exact &= masters.abs() >= 2.0**-16
    assert exact.double().mean() > 0.8
    weight, remainders = split_masters(masters[exact], dtype)
    assert same_bits(recode.master_of(weight, remainders), masters[exact])
    return masters[exact].to(HERE), remainders.to(HERE), new[exact].to(HERE)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_every_weight_in_both_forms(dtype):
    masters, remainders, weights = masters_of(dtype)
    wanted = followed(masters, weights)
    assert same_numbers(recode.master_of(weights, masters), wanted)
    steppable = ~wanted.isinf()  # infinity times a decay of 0 is NaN
    masters, remainders, weights = masters[steppable], remainders[steppable], weights[steppable]
    found = stepped(weights, masters)
    assert same_numbers(found, wanted[steppable])
    assert same_numbers(found, stepped(weights, remainders))
    kept = found != weights.float()
    assert 0.8 < kept.double().mean() < 1.0  # not where it was 0, nor for NaN and infinity


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_ties_and_tiny_masters(dtype):
    """Differences between the forms: half a unit fits only even weights, and digits below 2^-39 stay."""
    tie = 1 + torch.finfo(dtype).eps / 2  # rounds to 1, even
    new = torch.tensor([4.0, 4.0 * (1 + torch.finfo(dtype).eps)]).to(dtype)
    found = stepped(new, torch.full((2,), tie))
    assert found.tolist() == [4 * tie, new[1].item()]
    tiny = torch.tensor([2.0**-30 * (1 + 2.0**-23)])
    written = torch.zeros(1, dtype=dtype).add_(2.0)
    if dtype == torch.float16:  # 0 as a half: subnormal units
        assert stepped(written, tiny).item() == 2.0 + 2.0**-30 * 2**15  # the unit of 2 is 2^15 times as large
    assert same_bits(stepped(written, tiny), recode.master_of(written, tiny))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_masters_that_are_not_finite_become_the_weight(dtype):
    payloads = torch.tensor([0x7FC01234, 0x7F800001, -1, 0x7F800000, -0x800000]).to(torch.int32)
    weights = torch.full((5,), 1.5, dtype=dtype)
    found = stepped(weights, payloads.view(torch.float32))
    assert found.tolist() == [1.5] * 5
    assert same_bits(found, recode.master_of(weights, payloads.view(torch.float32)))


@pytest.mark.parametrize("master_weights", ["fp32", "split"])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_two_optimizers_on_one_parameter_lose_nothing(dtype, master_weights):
    """Each takes 160 steps of 1/16 of a unit: 20 units together, less what each has below half a unit."""
    unit = torch.finfo(dtype).eps
    param = torch.nn.Parameter(torch.full((500,), 1.5, dtype=dtype))
    param.grad = torch.full_like(param, -1.0)
    both = [optim.SGD([param], lr=unit / 16, master_weights=master_weights) for _ in range(2)]
    for _ in range(160):
        for optimizer in both:
            optimizer.step()
    assert ((param.double() - 1.5) / unit - 20).abs().max() <= 1


@pytest.mark.parametrize("make", [optim.AdamW, optim.SGD])
@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_both_forms_train_alike_while_weights_are_modified(dtype, make):
    """Nudges, clamps and constants between the steps: bit for bit, but for elements that were at a tie."""
    start = torch.randn(300, generator=torch.Generator().manual_seed(1)).to(dtype)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    forms = [
        make([p], lr=1e-3, master_weights=form) for p, form in zip(params, ("fp32", "split"), strict=True)
    ]
    random, same = torch.Generator().manual_seed(2), torch.ones(300, dtype=torch.bool)
    for step in range(12):
        noise, grad = (torch.randn(300, generator=random) for _ in range(2))
        for param, optimizer in zip(params, forms, strict=True):
            with torch.no_grad():
                if step % 4 == 1:
                    param.mul_(1 + 0.01 * noise.to(dtype))
                elif step % 4 == 2:
                    param.clamp_(-1.0, 1.0)
                elif step % 4 == 3:
                    param[::3] = 0.25
            param.grad = grad.to(dtype)
            optimizer.step()
        whole, split = (optimizer.state[p]["master"] for p, optimizer in zip(params, forms, strict=True))
        if dtype == torch.bfloat16:
            same &= (whole.view(torch.int32) & 0xFFFF) != 0x8000
        else:
            same &= whole.abs() >= 2.0**-16
        assert same_bits(params[0][same], params[1][same])
        assert same_bits(whole[same], recode.master_of(params[1].detach(), split.bits)[same])
    assert same.sum() > 280


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_weights_swapped_out_and_back_keep_every_master(dtype):
    masters, _, other = masters_of(dtype)
    weights, other = masters.to(dtype), other.clone()
    other[~other.isfinite()] = 1.0
    away = stepped(other, masters)
    fits = (away != other.float()) & (other.abs() >= 2.0**-14)
    # There and back again, where nothing was rounded on the way: between weights of one exponent.
    same = fits & (torch.frexp(other.float())[1] == torch.frexp(weights.float())[1])
    same &= torch.frexp(away)[1] == torch.frexp(masters)[1]
    assert same.sum() > 1000
    assert same_bits(stepped(weights, away)[same], masters[same])
