"""LAMB, LARS and NovoGrad: what their norms are of, and where ratios are 1."""

import copy

import pytest
import torch
from cases import BY_NAME, LAYERWISE, bits
from fusedamp import optim
from fusedamp.ops.inputs import AmpInputs, DeviceInputs
from on_device import HERE, SUMS
from storage_reference import followed

HALVES = [torch.bfloat16, torch.float16]


def one(kind, weight, grad, *, steps=1, amp=None, **options):
    """A parameter of these values after some steps with one gradient, and its state."""
    param = torch.nn.Parameter(weight.clone())
    optimizer = kind([param], **options)
    param.grad = grad.clone()
    for _ in range(steps):
        optimizer._amp = amp
        optimizer.step()
    return param.detach(), optimizer.state[param]


def amp(inv_scale=1.0, clip_coef=1.0, found_inf=0.0):
    inputs = DeviceInputs(torch.tensor(inv_scale), torch.tensor(clip_coef), torch.tensor(found_inf))
    return AmpInputs({HERE: inputs})


def test_lamb_moves_a_tensor_by_its_norm():
    """Guards the trust ratio: the first step moves by lr times the weights' norm, whatever the gradient's."""
    weight = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for size in (1e-3, 1.0, 1e3):
        grad = torch.randn(1000, generator=torch.Generator().manual_seed(1)) * size
        after, _ = one(optim.LAMB, weight, grad, lr=0.1)
        moved = (after - weight).norm() / weight.norm()
        assert abs(moved - 0.1) < 1e-6
        clipped, _ = one(optim.LAMB, weight, grad, lr=0.1, trust_clip=0.25)
        free, _ = one(optim.LAMB, weight, grad, lr=0.1, adapt=False)
        torch.testing.assert_close((clipped - weight) * 4, free - weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", LAYERWISE[:2], ids=str)
def test_the_ratio_is_1_where_a_norm_is_0(case):
    """Guards tensors that start at 0, as biases do, and gradients of 0: no 0 / 0, and the former move."""
    options = {**case.options, "weight_decay": 0.0}
    zeros, ones = torch.zeros(5), torch.ones(5)
    started, _ = one(case.ours, zeros, ones, **options)
    unscaled, _ = one(case.ours, zeros, ones, **options, adapt=False)
    assert torch.equal(started, unscaled)
    assert (started < 0).all()
    assert torch.equal(one(case.ours, ones, zeros, **options)[0], ones)
    assert torch.equal(one(case.ours, zeros, zeros, **options)[0], zeros)


def test_novograd_of_zero_gradients_stands_still():
    """Guards 0 / 0, also without eps."""
    after, state = one(optim.NovoGrad, torch.ones(5), torch.zeros(5), eps=0.0, steps=3)
    assert torch.equal(after, torch.ones(5))
    assert state["exp_avg_sq"] == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
@pytest.mark.parametrize("case", LAYERWISE[1:], ids=str)  # LAMB's second moment is FP32
def test_squares_neither_overflow_nor_vanish(case, size):
    """Guards the sums: FP32 cannot represent squares of 1e-30 and 1e30."""
    weight = torch.full((40_000,), 3.0)
    options = {**case.options, "eps": 0.0, "weight_decay": 0.0}
    expected, _ = one(case.ours, weight, torch.full_like(weight, 2.0**-3), **options)
    after, state = one(case.ours, weight, torch.full_like(weight, size), **options)
    torch.testing.assert_close(after, expected, rtol=1e-6, atol=0.0)
    if case.name == "novograd":
        squares = 40_000 * float(torch.tensor(size)) ** 2
        assert abs(float(state["exp_avg_sq"]) / squares - 1) < 1e-12


@pytest.mark.parametrize("case", LAYERWISE, ids=str)
def test_norms_are_of_unscaled_and_clipped_gradients(case):
    """Guards inv_scale and clip_coef: the same bits as with the gradient that they make."""
    generator = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(3000, generator=generator), torch.randn(3000, generator=generator)
    plain, expected = one(case.ours, weight, grad, **case.options, steps=2)
    scaled, state = one(case.ours, weight, grad * 2.0**12, **case.options, steps=2, amp=amp(2.0**-10, 0.25))
    assert torch.equal(plain, scaled)
    assert all(bits(state[name]) == bits(value) for name, value in expected.items())


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", LAYERWISE, ids=str)
def test_norms_are_of_masters_that_follow(case, dtype):
    """Guards the first pass: a written weight counts in it already, and others count by their masters."""
    generator = torch.Generator().manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(700, generator=generator).to(dtype)) for _ in range(2)]
    params[1] = copy.deepcopy(params[0])
    optimizers = [case.ours([p], **case.options) for p in params]
    for p, optimizer in zip(params, optimizers, strict=True):
        p.grad = torch.ones_like(p)
        optimizer.step()
    with torch.no_grad():
        for p in params:
            p[::7] *= 64  # seen at the next step
    master = optimizers[1].state[params[1]]["master"]
    master.copy_(followed(master, params[1].detach()))
    for optimizer in optimizers:
        optimizer.step()
    (one_, other), states = params, [o.state[p] for o, p in zip(optimizers, params, strict=True)]
    assert bits(one_) == bits(other)
    assert all(bits(states[0][name]) == bits(states[1][name]) for name in states[0])


@pytest.mark.parametrize("case", LAYERWISE, ids=str)
def test_threads_do_not_matter(case, threads):
    """Guards the order of the sums, over several chunks and tensors."""
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(n, generator=generator) for n in (100_003, 32_769, 5, 70_000)]
    ends = []
    for count in (1, 4):
        threads(count)
        params = [torch.nn.Parameter(v.clone()) for v in values]
        optimizer = case.ours(params, **case.options)
        for _ in range(2):
            for p in params:
                p.grad = p.detach().sin()
            optimizer.step()
        ends.append([bits(p) for p in params])
    assert ends[0] == ends[1]


@pytest.mark.parametrize("case", LAYERWISE, ids=str)
def test_an_overflow_leaves_scalars_alone(case):
    """Guards the skip: no second moment of a whole tensor takes what an overflow left in the gradient."""
    weight, grad = torch.randn(50), torch.full((50,), float("inf"))
    param = torch.nn.Parameter(weight.clone())
    optimizer = case.ours([param], **case.options)
    param.grad = torch.ones(50)
    optimizer.step()
    before = {name: bits(value) for name, value in optimizer.state[param].items()}
    param.grad = grad
    optimizer._amp = amp(found_inf=1.0)
    optimizer.step()
    assert {name: bits(value) for name, value in optimizer.state[param].items()} == before


@pytest.mark.parametrize("case", [*LAYERWISE, BY_NAME["nadam"]], ids=str)
def test_each_tensor_has_scalars_of_its_own(case):
    """Guards late gradients: the first step of a parameter is the same whenever it comes."""
    early, late = (torch.nn.Parameter(torch.linspace(1, 2, 9)) for _ in range(2))
    optimizer = case.ours([early, late], **case.options)
    early.grad = torch.linspace(0.1, 1, 9)
    optimizer.step()
    first = early.detach().clone()
    for _ in range(3):
        optimizer.step()
    late.grad = early.grad.clone()
    optimizer.step()
    assert torch.equal(late, first)
    for name in case.scalars:
        assert optimizer.state[late][name].dtype == torch.float64
        assert optimizer.state[late][name].shape == ()


def test_old_nadam_checkpoints():
    """Guards torch's checkpoints from before 2.0, which saved the product as a number."""
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = optim.NAdam([param])
    saved = optimizer.state_dict()
    saved["state"][0] = {"step": 2, "mu_product": 0.25, "exp_avg": torch.ones(3), "exp_avg_sq": torch.ones(3)}
    optimizer.load_state_dict(saved)
    assert optimizer.state[param]["mu_product"] == 0.25
    saved["state"][0]["mu_product"] = torch.ones(3)
    with pytest.raises(ValueError, match=r"state 'mu_product' of shape \[3\].*; expected \[\]"):
        optimizer.load_state_dict(saved)


STORAGE = [
    {"master_weights": "split"},
    {"state_dtype": torch.bfloat16},
    {"state_dtype": "int8"},
    {"master_weights": "split", "state_dtype": "int8"},
    {"master_weights": "none", "stochastic_rounding": True},
]


@pytest.mark.parametrize("storage", STORAGE, ids=str)
@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("case", [*LAYERWISE, BY_NAME["nadam"]], ids=str)
def test_compressed_storage_steps_as_fp32_does_at_first(case, dtype, storage):
    """Guards the pass before the step in every format: from states of 0 the first step is FP32's, whatever
    becomes of its results; the scalars stay FP64.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(40_001, generator=generator).to(dtype)
    grad = torch.randn(40_001, generator=generator).to(dtype)
    options = {**case.options, "lr": 2.0**-3}
    plain, expected = one(case.ours, weight, grad, **options)
    after, state = one(case.ours, weight, grad, **options, **storage)
    for name in case.scalars:
        torch.testing.assert_close(state[name], expected[name], rtol=SUMS, atol=0.0)
    # A neighbor in the 16-bit format: ties, or a random rounding.
    ulp = torch.finfo(dtype).eps * plain.float().abs() + torch.finfo(dtype).tiny * torch.finfo(dtype).eps
    assert ((after.float() - plain.float()).abs() <= ulp).all()
    if storage.get("master_weights") != "none" and "split" not in storage.values():
        assert bits(state["master"]) == bits(expected["master"])
        assert bits(after) == bits(plain)
    if storage == {"master_weights": "split"} and dtype == torch.bfloat16:
        bits_of = after.view(torch.int16).int() * 2**16 + state["master"].bits.int()
        assert torch.equal(bits_of.view(torch.float32), expected["master"])
