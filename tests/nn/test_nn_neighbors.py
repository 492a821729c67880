"""fusedamp.nn between other code: in-place operations, frozen and shared weights, subclasses, tracers,
counters.

Guards: models that work with nn.Linear and not after convert, casts that are stale or kept once per call.
"""

import copy

import fusedamp
import pytest
import torch
import torch.nn.functional as F
from fusedamp.nn import MLP, Linear, convert, functional, fusions
from on_device import DEVICE
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

FUSED = {"gelu": True, "gelu_grad": True}
INPLACE = {
    "relu": lambda y, r: F.relu_(y),
    "residual": lambda y, r: y.add_(r),
    "slice": lambda y, r: y[..., :1].zero_() if y.dim() else y,
    "dropout": lambda y, r: F.dropout(y, 0.0, inplace=True),
}


def autocast(dtype=torch.bfloat16, **options):
    return torch.autocast(DEVICE, dtype=dtype, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(4,), (3, 4), (2, 3, 4), (50, 4)], ids=str)
@pytest.mark.parametrize("change", INPLACE)
@pytest.mark.parametrize("layer", ["Linear", "LinearGELU", "MLP"])
def test_outputs_may_be_written(layer, change, shape, dtype):
    """As those of nn.Linear: activations, residuals and dropout in place."""
    torch.manual_seed(0)
    module = MLP(4, 8) if layer == "MLP" else getattr(fusedamp.nn, layer)(4, 4)
    grads = []
    for inplace in (True, False):
        x = torch.ones(shape, requires_grad=True)
        with fusions(**FUSED), autocast(dtype):
            y = module(x)
            residual = torch.ones_like(y)
            if inplace:
                INPLACE[change](y, residual)
            else:
                y = y.clone()
                INPLACE[change](y, residual)
        y.float().sum().backward()
        grads.append([x.grad, *(p.grad for p in module.parameters())])
        module.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def saved_weights(module, calls, **options):
    """The distinct memory of what is saved of a weight by calls in one region."""
    seen = set()
    keep = []

    def pack(t):
        if t.shape == module.weight.shape:
            seen.add(t.data_ptr())
            keep.append(t)
        return t

    x = torch.ones(2, module.in_features, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), autocast(**options):
        for _ in range(calls):
            x = module(x)
    x.float().sum().backward()
    return seen


def test_calls_in_a_region_share_the_cast():
    """As by torch: a looped block saves one copy of its weight. Without autocast's cache there is one for
    each."""
    for module in (Linear(256, 256), fusedamp.nn.LinearGELU(256, 256)):
        with fusions(gelu=True):
            assert len(saved_weights(module, 5)) == 1
            assert len(saved_weights(module, 5, cache_enabled=False)) == 5


def test_casts_of_an_earlier_region_are_not_used():
    """Also while its graph lives, and after a write that autograd does not see."""
    module = Linear(256, 256, bias=False)
    x = torch.ones(1, 256)
    with autocast():
        first = module(x)
    module.weight.data.mul_(2)
    with autocast():
        second = module(x)
    assert torch.equal(second, 2 * first)


def test_frozen_between_forward_and_backward():
    module = Linear(2, 2)
    module.weight.grad, module.bias.grad = torch.zeros(2, 2), torch.zeros(2)
    with autocast():
        y = module(torch.ones(3, 2, requires_grad=True))
    module.requires_grad_(False)
    y.sum().backward()
    assert not module.weight.grad.any()
    assert not module.bias.grad.any()


def test_anomaly_mode_finds_nan_in_later_gradients():
    module = Linear(2, 2)
    module.weight.grad = torch.zeros(2, 2)
    with torch.autograd.set_detect_anomaly(True), autocast():
        y = module(torch.full((3, 2), float("nan")))
        with pytest.raises(RuntimeError, match="returned nan values"):
            y.float().nan_to_num().sum().backward()


@pytest.mark.host
def test_nested_tensors_are_torchs():
    layer = convert(nn.Linear(4, 3))
    nested = torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(5, 4)], layout=torch.strided)
    with torch.no_grad():
        y = layer(nested)
    assert torch.equal(y.unbind()[1], layer(torch.ones(5, 4)))


def test_sparse_inputs_and_gradients():
    layer = Linear(4, 3)
    plain = copy.deepcopy(layer)
    with autocast():
        layer(torch.eye(4).to_sparse()).sum().backward()
        plain(torch.eye(4)).sum().backward()
    assert torch.equal(layer.weight.grad, plain.weight.grad)
    layer.zero_grad()
    with autocast():
        y = layer(torch.eye(4))
    y.backward(torch.ones_like(y).to_sparse())
    assert torch.equal(layer.weight.grad, plain.weight.grad)


@pytest.mark.parametrize("sizes", [(0, 3), (3, 0)], ids=str)
def test_layers_without_features(sizes):
    layer = Linear(*sizes)
    with autocast():
        y = layer(torch.ones(2, 5, sizes[0], requires_grad=True))
    y.sum().backward()
    assert y.shape == (2, 5, sizes[1])
    assert layer.weight.grad.shape == layer.weight.shape


def test_inference_weights():
    """A frozen weight made in inference mode beside a bias that trains."""
    with torch.inference_mode():
        weight = torch.ones(3, 2)
    bias = nn.Parameter(torch.zeros(3))
    with autocast():
        functional.linear(torch.ones(4, 2), weight, bias).sum().backward()
    assert torch.equal(bias.grad, torch.full((3,), 4.0))


def test_functional_call_with_float32_gradients_of_16_bit_weights():
    module = Linear(1, 1, grad_dtype=torch.float32).bfloat16()
    leaves = {k: v.detach().clone().requires_grad_() for k, v in module.named_parameters()}
    torch.func.functional_call(module, leaves, torch.ones(257, 1).bfloat16()).sum().backward()
    assert leaves["weight"].grad.item() == 257.0


class Marked(nn.Parameter):
    """A subclass that only carries a mark."""


def test_marked_parameters_are_plain():
    weight = Marked(torch.ones(1, 1))
    with autocast():
        functional.linear(torch.ones(257, 1), weight).sum().backward()
    assert weight.grad.item() == 257.0


@pytest.mark.host
def test_traced_graphs_record_the_layer():
    """fx: a graph that trains has the gradients of the model."""
    module = nn.Sequential(Linear(1, 1))
    traced = torch.fx.symbolic_trace(module)
    with autocast():
        traced(torch.ones(257, 1)).sum().backward()
    assert module[0].weight.grad.item() == 257.0


@pytest.mark.host
def test_compiled_transforms_are_not_rounded():
    """A compiler traces the forward function alone: an error, not 256."""
    weight = torch.ones(1, 1)

    def loss(w):
        with autocast():
            return functional.linear(torch.ones(257, 1), w).float().sum()

    assert torch.func.grad(loss)(weight).item() == 257.0
    torch._dynamo.reset()
    try:
        got = torch.compile(torch.func.grad(loss), backend="eager")(weight).item()
    except Exception:
        return
    finally:
        torch._dynamo.reset()
    assert got == 257.0


def test_flops_are_counted():
    """As those of nn.Linear, by torch's counter."""
    counts = []
    for model in (
        nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4)),
        convert(nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 4))),
    ):
        for dtype in (torch.bfloat16, torch.float16):
            with FlopCounterMode(display=False) as counter, autocast(dtype):
                model(torch.ones(64, 8, requires_grad=True)).sum().backward()
                model(torch.ones(64, 8, requires_grad=True)).sum().backward()
            counts.append(counter.get_total_flops())
    assert len(set(counts)) == 1, counts
    with FlopCounterMode(display=False) as counter, fusions(**FUSED), autocast():
        MLP(8, 16)(torch.ones(64, 8, requires_grad=True)).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 64 * 8 * 16


def test_an_mlp_that_is_edited():
    module = MLP(4, 8)
    with pytest.raises(ValueError, match=r"\[MLP\] activation is 'silu'; expected"):
        module.activation = "silu"
    x = torch.randn(3, 4)
    module.activation = "relu"
    assert torch.equal(module(x), module.fc2(F.relu(module.fc1(x))))
    module.activation = "gelu_tanh"
    calls = []
    module.fc1._compiled_call_impl = lambda x: (
        calls.append(1) or F.linear(x, module.fc1.weight, module.fc1.bias)
    )
    module(x)
    assert calls == [1]


def test_errors_in_backward_are_named():
    """The gradient lies in the memory of the saved input."""
    memory = torch.zeros(64)
    weight = nn.Parameter(torch.ones(3, 4))
    x = memory.view(torch.bfloat16)[:8].view(2, 4)
    weight.grad = memory[:12].view(3, 4)
    with autocast():
        y = functional.linear(x, weight)
    with pytest.raises(ValueError, match=r"^\[linear_weight_grad_\] acc .* shares memory with x"):
        y.sum().backward()


def test_a_grad_dtype_that_is_edited():
    module = Linear(2, 2, dtype=torch.bfloat16)
    module.grad_dtype = torch.float64
    with pytest.raises(
        ValueError, match=r"\[Linear\] grad_dtype is torch.float64; expected torch.float32 or None"
    ):
        module(torch.ones(1, 2).bfloat16())
