"""Steps under inference mode, under FakeTensorMode, and gradients with a lazy negation."""

import copy

import pytest
import torch
from cases import COMPOSED, MAIN, kept, make_params, set_grads
from fusedamp import GradScaler, optim
from on_device import DEVICE
from torch._subclasses.fake_tensor import FakeTensorMode

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
FORMATS = [{}, {"master_weights": "split", "state_dtype": "int8", "rounding_seed": 1}]


def results(params, optimizer):
    return [*params, *(value for param in params for value in kept(optimizer.state[param]).values())]


@pytest.mark.parametrize("options", FORMATS, ids=["fp32", "compressed"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inference_mode_changes_nothing(dtype, options):
    """Gradients made in it, a first step in it, later ones outside and the other way round."""
    ends = []
    for inside in ([], [0], [1], [0, 1, 2, 3], [3]):
        params = make_params(dtype)
        optimizer = optim.AdamW(params, lr=1e-2, **options)
        for step in range(5):
            with torch.inference_mode(step in inside):
                set_grads(params, step)
                optimizer.step()
        assert not any(t.is_inference() for t in results(params, optimizer))
        ends.append(results(params, optimizer))
    for end in ends[1:]:
        assert all(torch.equal(a, b) for a, b in zip(end, ends[0], strict=True))


def test_checkpoints_loaded_under_inference_mode_can_be_stepped():
    params, copies = make_params(torch.bfloat16), make_params(torch.bfloat16)
    optimizer, other = optim.AdamW(params), optim.AdamW(copies)
    set_grads(params, 0)
    optimizer.step()
    with torch.inference_mode():
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_grads(copies, 1)
    other.step()
    assert other.state[copies[0]]["step"] == 2


@pytest.mark.parametrize("case", MAIN + COMPOSED, ids=str)
@pytest.mark.parametrize("with_scaler", [False, True])
def test_fake_tensors_step(case, with_scaler):
    """Shapes and dtypes of states are found without memory, as tools that plan memory do."""
    with FakeTensorMode():
        params = [torch.nn.Parameter(torch.empty(8, 4).bfloat16()), torch.nn.Parameter(torch.empty(5))]
        optimizer, scaler = case.ours(params, **case.options), GradScaler(DEVICE, init_scale=4.0)
        scaler.scale(torch.ones(()))
        for _ in range(4):
            for p in params:
                p.grad = torch.empty_like(p)
            if with_scaler:
                scaler.step(optimizer)
                scaler.update()
            else:
                optimizer.step()
        entry = optimizer.state[params[0]]
        assert entry["master"].dtype == torch.float32
        assert entry["step"].shape == ()


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_lazily_negated_gradients_keep_their_sign(shape, dtype):
    """A lazy negation that no field shows, at the first and later steps, alone and with others."""
    ends = []
    for lazy in (False, True):
        params = make_params(dtype, [(4,), shape])
        optimizer = optim.SGD(params, lr=0.5)
        for step in range(5):
            grads = set_grads(params, step)
            params[1].grad = torch._neg_view(grads[1].neg()) if lazy and step != 1 else grads[1]
            assert params[1].grad.is_neg() == (lazy and step != 1)
            optimizer.step()
        ends.append([p.detach() for p in params])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def test_the_real_gradient_of_a_conjugated_number():
    """As torch makes it: the imaginary part of a conjugate."""
    grad = torch.complex(torch.zeros(1), torch.ones(1)).conj().imag
    assert grad.is_neg()
    assert grad.is_contiguous()
    param = torch.nn.Parameter(torch.zeros(1))
    optimizer = optim.SGD([param], lr=1.0)
    for step in range(4):
        param.grad = grad
        optimizer.step()
        assert param.item() == step + 1
