"""Tensors are paired by strides: every layout gives the values that the contiguous one gives."""

import pytest
import torch
from cases import BY_NAME, COMPOSED, LAYERWISE, MAIN, bits, make_params, set_grads
from on_device import SUMS
from test_optim_skip import amp, step

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPE = (4, 3, 5, 2)


def guarded(values: torch.Tensor, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """``values`` at an odd address, and the buffer around it, which must not be written."""
    buffer = torch.full((values.numel() + 2 * offset,), 123.0, dtype=values.dtype)
    view = buffer[offset : offset + values.numel()].view(values.shape)
    view.copy_(values)
    return view, buffer


def with_gaps(values: torch.Tensor) -> torch.Tensor:
    """``values`` as every second column of a larger tensor that holds 123 elsewhere."""
    wide = torch.full((*values.shape[:-1], values.shape[-1] * 2), 123.0, dtype=values.dtype)
    wide[..., ::2] = values
    return wide[..., ::2]


LAYOUTS = {
    "contiguous": lambda t: t.clone(),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 2).contiguous().transpose(0, 2),
    "permuted": lambda t: t.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
    "misaligned": lambda t: guarded(t, 1)[0],
    "gaps": with_gaps,
}


def train(case, dtype, param_layout, grad_layout, steps=3):
    torch.manual_seed(0)
    param = torch.nn.Parameter(param_layout(torch.randn(SHAPE).to(dtype)))
    optimizer = case.ours([param], **case.options)
    for _ in range(steps):
        param.grad = grad_layout(torch.randn(SHAPE).to(dtype))
        optimizer.step()
    return param, optimizer.state[param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("grad_layout", LAYOUTS)
@pytest.mark.parametrize("param_layout", LAYOUTS)
def test_every_pair_of_layouts(param_layout, grad_layout, dtype):
    """Guards against pairing by raw memory: torch's CPU fused AdamW is silently wrong where strides
    differ.
    """
    case = BY_NAME["adamw"]
    expected, expected_state = train(case, dtype, LAYOUTS["contiguous"], LAYOUTS["contiguous"])
    param, state = train(case, dtype, LAYOUTS[param_layout], LAYOUTS[grad_layout])
    assert torch.equal(param, expected)
    for name, value in state.items():
        assert torch.equal(value, expected_state[name]), name
    if param_layout != "gaps":
        assert state["exp_avg"].stride() == param.stride()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_gaps_are_not_written(case, dtype):
    """Guards parameters that are not dense: the memory between their elements stays, also on a skipped
    step.
    """
    param = torch.nn.Parameter(with_gaps(torch.randn(6, 5).to(dtype)))
    whole = torch.as_strided(param.detach(), (60,), (1,))
    optimizer = case.ours([param], **case.options)
    set_grads([param], 0)
    optimizer.step()
    assert (whole[1::2] == 123).all()
    assert (param != 123).all()
    before = bits(whole)
    step(optimizer, amp(1.0))
    assert bits(whole) == before


@pytest.mark.parametrize("offset", [1, 2, 3, 5])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_misaligned_views_are_right_and_nothing_around_them_is_written(case, dtype, offset):
    """Guards vector accesses: every size up to two vectors, at odd addresses, between guard elements."""
    shapes = [(n,) for n in range(1, 36)]
    plain = make_params(dtype, shapes)
    params, buffers = zip(*(guarded(p.detach(), offset) for p in plain), strict=True)
    params = [torch.nn.Parameter(p) for p in params]
    optimizer, expected = case.ours(params, **case.options), case.ours(plain, **case.options)
    for s in range(2):
        set_grads(plain, s)
        grads = [guarded(p.grad, offset) for p in plain]
        for p, (grad, _) in zip(params, grads, strict=True):
            p.grad = grad
        optimizer.step()
        expected.step()
        for buffer in [*buffers, *(b for _, b in grads)]:
            assert (buffer[:offset] == 123).all()
            assert (buffer[-offset:] == 123).all()
    summed = SUMS if case in LAYERWISE and dtype == torch.float64 else 0.0  # narrower weights hide it
    for p, q in zip(params, plain, strict=True):
        torch.testing.assert_close(p, q, rtol=summed, atol=summed)


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
def test_empty_and_0_dim_parameters(case):
    """Guards launches: an empty last tensor, only empty tensors, and 0-dim ones are stepped and counted."""
    for shapes in ([(0,)], [(3, 0), (0, 2)], [()], [(5,), ()], [(5,), (0,)], [(0,), (5,)]):
        params, before = make_params(torch.float32, shapes), make_params(torch.float32, shapes)
        optimizer = case.ours(params, **case.options)
        set_grads(params, 0)
        optimizer.step()
        assert all(optimizer.state[p]["step"] == 1 for p in params)
        for p, q in zip(params, before, strict=True):
            assert p.shape == q.shape
            assert (p != q).all()


def test_expanded_gradient():
    """Guards gradients with elements that share memory, as from loss = param.sum()."""
    param, same = (torch.nn.Parameter(torch.randn(6, 4, generator=torch.manual_seed(0))) for _ in range(2))
    param.grad = torch.full((), 0.5).expand(6, 4)
    same.grad = torch.full((6, 4), 0.5)
    for p in (param, same):
        BY_NAME["adamw"].ours([p]).step()
    assert torch.equal(param, same)


def test_strides_of_size_1_dimensions_do_not_matter():
    """Guards 1x1 convolutions in channels_last: their two layouts are the same memory order."""
    values = torch.randn(8, 4, 1, 1)
    param = torch.nn.Parameter(values.clone(memory_format=torch.channels_last))
    same = torch.nn.Parameter(values.clone())
    param.grad, same.grad = values.as_strided((8, 4, 1, 1), (4, 1, 7, 9)), values
    for p in (param, same):
        BY_NAME["adamw"].ours([p]).step()
    assert torch.equal(param, same)


@pytest.mark.parametrize("case", MAIN, ids=str)
def test_layout_changed_after_the_first_step(case):
    """Guards what is remembered between steps: the state follows a parameter into another memory format."""
    torch.manual_seed(0)
    grads = torch.randn(4, *SHAPE)
    results = []
    for change in (lambda t: t, lambda t: t.contiguous(memory_format=torch.channels_last), with_gaps):
        param = torch.nn.Parameter(torch.ones(SHAPE, dtype=torch.bfloat16))
        optimizer = case.ours([param], **case.options)
        for s, grad in enumerate(grads):
            if s == 2:
                param.grad = None
                param.data = change(param.data)
            param.grad = grad.bfloat16()
            optimizer.step()
        results.append((param, optimizer.state[param]["master"]))
    for param, master in results[1:]:
        assert torch.equal(param, results[0][0])
        assert torch.equal(master, results[0][1])


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("case", MAIN, ids=str)
def test_complex_parameters(case, dtype):
    """Guards complex parameters, lazily conjugated gradients included: two real numbers each, as in torch."""
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 3, dtype=dtype)) for _ in range(2)]
    params[1] = torch.nn.Parameter(params[1].detach().t())
    real = [torch.nn.Parameter(torch.view_as_real(p.detach()).clone()) for p in params]
    optimizer, expected = case.ours(params, **case.options), case.ours(real, **case.options)
    for _ in range(3):
        for p, q in zip(params, real, strict=True):
            p.grad = torch.randn_like(p).conj()
            assert p.grad.is_conj()
            q.grad = torch.view_as_real(p.grad.resolve_conj())
        optimizer.step()
        expected.step()
    for p, q in zip(params, real, strict=True):
        assert torch.equal(torch.view_as_real(p), q)
        for name, value in optimizer.state[p].items():
            wide = torch.float64 if name in case.scalars else dtype
            assert value.dtype == (torch.float32 if name == "step" else wide)


@pytest.mark.filterwarnings("ignore:ComplexHalf")
def test_complex32_has_a_complex64_master():
    """Guards the smallest complex dtype: its FP16 pairs get FP32 masters."""
    values = torch.randn(6, 2).half()
    param = torch.nn.Parameter(torch.view_as_complex(values.clone()))
    real = torch.nn.Parameter(values.clone())
    param.grad, real.grad = torch.view_as_complex(values.clone()), values.clone()
    optimizer = BY_NAME["adamw"].ours([param])
    for o in (optimizer, BY_NAME["adamw"].ours([real])):
        o.step()
    assert torch.equal(torch.view_as_real(param), real)
    assert optimizer.state[param]["master"].dtype == torch.complex64


def test_negated_gradient():
    """Guards lazily negated gradients: the raw memory of such a tensor has the wrong sign."""
    negated = torch.randn(5, dtype=torch.complex64).conj().imag
    assert negated.is_neg()
    param, same = torch.nn.Parameter(torch.ones(5)), torch.nn.Parameter(torch.ones(5))
    param.grad, same.grad = negated, negated.resolve_neg().clone()
    for p in (param, same):
        BY_NAME["sgd"].ours([p], lr=0.1).step()
    assert torch.equal(param, same)
