"""unscale_ on every type of gradient, against the plain product, and on overflow before and after it."""

import pytest
import torch
from fusedamp import GradScaler
from hypothesis import given, settings
from hypothesis import strategies as st
from on_device import DEVICE, HERE

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def scaler_at(scale):
    scaler = GradScaler(DEVICE, init_scale=scale)
    scaler.scale(torch.ones(()))
    return scaler


def optimizer_of(*grads):
    params = []
    for grad in grads:
        params.append(torch.zeros(grad.shape, dtype=grad.dtype, requires_grad=True))
        params[-1].grad = grad
    return torch.optim.SGD(params, lr=0.0)


def grads_of(optimizer):
    return [param.grad for param in optimizer.param_groups[0]["params"]]


def found(scaler, optimizer):
    return {str(device): flag.item() for device, flag in scaler._found_inf_per_device(optimizer).items()}


def test_all_dtypes_in_one_call():
    """FP16 and BF16 gradients, which torch does not support, with all others; 1/4 is exact in each dtype."""
    grads = [torch.tensor([4.0, -2.0, 0.0], dtype=dtype) for dtype in DTYPES]
    grads += [torch.tensor([4 + 2j, -2j], dtype=dtype) for dtype in (torch.complex64, torch.complex128)]
    grads += [torch.empty(0), torch.tensor(8.0)]
    expected = [grad / 4 for grad in grads]
    scaler, optimizer = scaler_at(4.0), optimizer_of(*grads)
    scaler.unscale_(optimizer)
    for grad, before, wanted in zip(grads_of(optimizer), grads, expected, strict=True):
        assert grad is before, "written in place: DDP holds views of the same memory"
        assert torch.equal(grad, wanted)
    assert found(scaler, optimizer) == {str(HERE): 0.0}


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.sampled_from(DTYPES), st.sampled_from([3.0, 1000.0, 2.0**16]), st.integers(0, 2**31))
def test_unscaled_as_torch_does(dtype, scale, seed):
    """Bit for bit torch's own op (FP16 and BF16: called past its check), also where 1/scale is rounded."""
    random = torch.Generator().manual_seed(seed)
    expected = torch.randn(1000, generator=random, device="cpu").to(dtype)  # torch has no other op for BF16
    grad, flag = expected.to(HERE, copy=True), torch.zeros((), device="cpu")
    inverse = torch.tensor(scale, device="cpu").double().reciprocal().float()
    torch._amp_foreach_non_finite_check_and_unscale_([expected], flag, inverse)
    scaler, optimizer = scaler_at(scale), optimizer_of(grad)
    scaler.unscale_(optimizer)
    assert torch.equal(grad, expected.to(HERE))
    assert found(scaler, optimizer)[str(HERE)] == flag.item()


LAYOUTS = {
    "transposed": torch.arange(6.0).reshape(2, 3).t(),
    "channels_last": torch.arange(48.0).reshape(2, 3, 4, 2).to(memory_format=torch.channels_last),
    "gaps": torch.arange(12.0)[::2],
    "narrowed": torch.arange(12.0).reshape(3, 4)[:, 1:3],
    "misaligned": torch.arange(9.0)[1:],
    "conjugated": torch.view_as_complex(torch.arange(8.0).reshape(4, 2)).conj(),
    "complex with gaps": torch.view_as_complex(torch.arange(16.0).reshape(8, 2))[::2],
    "negated": torch.view_as_complex(torch.arange(8.0).reshape(4, 2)).conj().imag,
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_are_written_in_place_and_nothing_beside_them(name):
    grad = LAYOUTS[name].clone(memory_format=torch.preserve_format)
    if name in ("gaps", "narrowed", "misaligned", "complex with gaps"):
        base = torch.full((4, grad.numel()), 7.0, dtype=grad.dtype)
        strides = {"gaps": (2,), "narrowed": (4, 1), "misaligned": (1,), "complex with gaps": (2,)}[name]
        view = base.view(-1).as_strided(grad.shape, strides, 1)
        grad = view.copy_(grad)
        outside = torch.ones(base.numel(), dtype=torch.bool)
        outside.as_strided(grad.shape, strides, 1).fill_(False)
    expected = grad.resolve_conj().resolve_neg().clone() / 2
    scaler, optimizer = scaler_at(2.0), optimizer_of(grad)
    scaler.unscale_(optimizer)
    assert grads_of(optimizer)[0] is grad
    assert torch.equal(grad, expected)
    if name in ("gaps", "narrowed", "misaligned", "complex with gaps"):
        assert (base.view(-1)[outside] == 7).all()


def test_expanded_gradient_is_replaced_by_a_dense_one():
    """torch's op raises for it, or would multiply one address many times."""
    optimizer = optimizer_of(torch.ones(2, 3))
    param = optimizer.param_groups[0]["params"][0]
    param.grad = torch.full((1,), 6.0).expand(2, 3)
    scaler_at(2.0).unscale_(optimizer)
    assert torch.equal(param.grad, torch.full((2, 3), 3.0))


def sparse(indices, values):
    return torch.sparse_coo_tensor(torch.tensor([indices]), values, (3,), check_invariants=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sparse_gradients(dtype):
    grad = sparse([1, 1, 0], torch.tensor([4.0, 2.0, 8.0], dtype=dtype))
    scaler, optimizer = scaler_at(2.0), optimizer_of(grad)
    scaler.unscale_(optimizer)
    assert torch.equal(grads_of(optimizer)[0].to_dense(), torch.tensor([4.0, 3.0, 0.0], dtype=dtype))
    assert found(scaler, optimizer) == {str(HERE): 0.0}


def test_sparse_duplicates_that_overflow_together_are_seen():
    grad = sparse([1, 1], torch.full((2,), 60000.0, dtype=torch.float16))
    scaler, optimizer = scaler_at(1024.0), optimizer_of(grad)
    scaler.unscale_(optimizer)
    assert found(scaler, optimizer) == {str(HERE): 1.0}


def test_embedding_gradient_with_one_expanded_row():
    weight = torch.nn.Embedding(4, 3, sparse=True)
    scaler = scaler_at(4.0)
    optimizer = torch.optim.SparseAdam(weight.parameters(), lr=0.5)
    scaler.scale(weight(torch.tensor([2])).sum()).backward()
    before = weight.weight.detach().clone()
    scaler.step(optimizer)
    assert torch.equal(weight.weight.grad.to_dense()[2], torch.ones(3))
    assert (weight.weight[2] < before[2]).all()


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("position", [0, 17, 99])
def test_overflow_before_unscaling(bad, dtype, position):
    grad = torch.ones(100, dtype=dtype)
    grad[position] = bad
    scaler, optimizer = scaler_at(2.0), optimizer_of(torch.ones(3), grad)
    scaler.unscale_(optimizer)
    assert found(scaler, optimizer) == {str(HERE): 1.0}


def test_overflow_made_by_unscaling():
    """60000 / 0.25 is beyond FP16: torch checks only the inputs and steps with inf."""
    scaler, optimizer = scaler_at(0.25), optimizer_of(torch.full((3,), 60000.0, dtype=torch.float16))
    scaler.unscale_(optimizer)
    assert found(scaler, optimizer) == {str(HERE): 1.0}


@pytest.mark.filterwarnings("ignore:Sparse CSR")
def test_bad_layout_changes_nothing():
    optimizer = optimizer_of(torch.ones(2))
    param = torch.eye(2).to_sparse_csr().requires_grad_()
    param.grad = torch.eye(2).to_sparse_csr()
    optimizer.add_param_group({"params": param})
    with pytest.raises(
        ValueError, match=r"layout torch.sparse_csr; expected torch.strided or torch.sparse_coo"
    ):
        scaler_at(2.0).unscale_(optimizer)
    assert torch.equal(grads_of(optimizer)[0], torch.ones(2))


def test_what_is_no_parameter_has_torchs_error():
    optimizer = optimizer_of(torch.ones(2))
    optimizer.param_groups[0]["params"].append("weight")
    with pytest.raises(AssertionError, match=r"expected param to be torch.Tensor, got str"):
        scaler_at(2.0).unscale_(optimizer)


def test_autograd_notices_the_write():
    grad = torch.ones(3)
    version = grad._version
    scaler_at(2.0).unscale_(optimizer_of(grad))
    assert grad._version > version
