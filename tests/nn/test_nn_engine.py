"""fusedamp.nn in all modes of the autograd engine: hooks, graphs that are kept, differentiated, checkpointed.

Guards: hooks that miss a gradient, ``.grad`` that a call must leave alone, second derivatives, leaks. Numbers
are whole, so that equality is exact.
"""

import gc
import weakref

import fusedamp
import pytest
import torch
import torch.nn.functional as F
from fusedamp.nn import functional, gradients
from linear_modes import MODES, Mode, layer, reference, whole
from on_device import DEVICE
from torch.utils.checkpoint import checkpoint

HOOKS = {"halves": lambda g: g / 2, "looks": lambda g: None}


@pytest.fixture(params=MODES)
def mode(request):
    return Mode(request.param)


@pytest.mark.parametrize("hook", HOOKS)
def test_tensor_hooks_see_the_gradient(hook, mode):
    """A hook that halves: 4 + 2 / 2 = 5; it gets the FP32 gradient of each backward, not None."""
    weight, bias = mode.parameters(1, 1)
    mode.linear(torch.ones(4, 1), weight, bias).sum().backward()
    seen = []

    def watch(grad):
        seen.append((grad.dtype, grad.item()))
        return HOOKS[hook](grad)

    handle = weight.register_hook(watch)
    mode.linear(torch.ones(2, 1), weight, bias).sum().backward()
    assert seen == [(torch.float32, 2.0)]
    assert weight.grad.item() == (5.0 if hook == "halves" else 6.0)
    handle.remove()
    grad = weight.grad
    mode.linear(torch.ones(1, 1), weight, bias).sum().backward()
    assert weight.grad is grad
    assert grad.item() == (6.0 if hook == "halves" else 7.0)


def test_multi_grad_hooks(mode):
    weight, bias = mode.parameters(1, 1)
    mode.linear(torch.ones(4, 1), weight, bias).sum().backward()
    seen = []
    torch.autograd.graph.register_multi_grad_hook(
        [weight, bias], lambda grads: seen.append([g.item() for g in grads])
    )
    mode.linear(torch.ones(2, 1), weight, bias).sum().backward()
    assert seen == [[2.0, 2.0]]
    assert weight.grad.item() == 6.0


def test_module_backward_hooks():
    module = fusedamp.nn.Linear(1, 1)
    seen = []
    module.register_full_backward_hook(lambda m, gi, go: seen.append((gi[0].shape, go[0].item())))
    for _ in range(2):
        with torch.autocast(DEVICE, dtype=torch.bfloat16):
            y = module(torch.ones(1, 1, requires_grad=True))
        y.backward(torch.full_like(y, 3.0))
    assert seen == [(torch.Size([1, 1]), 3.0)] * 2
    assert module.weight.grad.item() == 6.0


def test_autograd_grad_returns_and_leaves_grad_alone(mode):
    """Wanted 5 and 5: the gradient of 5 rows, and .grad of 5 rows from before."""
    weight, bias = mode.parameters(1, 1)
    mode.linear(torch.ones(5, 1), weight, bias).sum().backward()
    y = mode.linear(torch.ones(5, 1), weight, bias)
    (got,) = torch.autograd.grad(y.sum(), weight)
    assert got.item() == 5.0
    assert got.dtype is torch.float32
    assert weight.grad.item() == 5.0
    x = torch.ones(5, 1, requires_grad=True)
    y = mode.linear(x, weight, bias)
    torch.autograd.grad(y.sum(), x)
    assert weight.grad.item() == 5.0


def test_backward_of_some_inputs(mode):
    """inputs=[x] leaves .grad of the weight alone, and runs no product for it; inputs=[weight] adds to it."""
    weight, bias = mode.parameters(1, 1)
    mode.linear(torch.ones(5, 1), weight, bias).sum().backward()
    x = torch.ones(2, 1, requires_grad=True)
    y = mode.linear(x, weight, bias)
    with torch.profiler.profile() as log:
        y.sum().backward(inputs=[x], retain_graph=True)
    assert weight.grad.item() == 5.0
    assert not any("linear_weight_grad" in e.key for e in log.key_averages())
    assert (
        x.grad.item() if x.numel() == 1 else torch.equal(x.grad.float(), weight.detach().float().expand(2, 1))
    )
    grad = weight.grad
    y.sum().backward(inputs=[weight])
    assert weight.grad is grad
    assert grad.item() == 7.0
    assert bias.grad.item() == 5.0


@pytest.mark.parametrize("with_bias", [True, False])
def test_backward_of_some_inputs_of_a_fused_mlp(with_bias):
    """Each weight asks for itself."""
    module = fusedamp.nn.MLP(4, 8, bias=with_bias)
    x = whole(3, 4)

    def output():
        with fusedamp.nn.fusions(gelu=True, gelu_grad=True), torch.autocast(DEVICE, dtype=torch.bfloat16):
            return module(x).float().sum()

    output().backward()
    parameters = dict(module.named_parameters())
    for name, p in parameters.items():
        before = {other: q.grad.clone() for other, q in parameters.items()}
        output().backward(inputs=[p])
        for other, q in parameters.items():
            wanted = 2 * before[other] if other == name else before[other]
            torch.testing.assert_close(q.grad, wanted, rtol=1e-5, atol=1e-5)
            q.grad.copy_(before[other])


def test_retain_graph(mode):
    weight, bias = mode.parameters()
    x, dy = whole(4, 5).requires_grad_(), whole(4, 3, seed=7)
    y = mode.linear(x, weight, bias)
    for _ in range(3):
        y.backward(dy.bfloat16(), retain_graph=True)
    wanted = reference(x.detach(), weight, bias, dy)
    assert all(torch.equal(p.grad.float(), 3 * w) for p, w in zip((x, weight, bias), wanted, strict=True))


def test_create_graph(mode):
    """Second derivatives with respect to input, weight and output gradient, against FP32's."""
    results = []
    for linear in (mode.linear, lambda x, w, b: F.linear(x, w.float(), b.float())):
        weight, bias = mode.parameters()
        x = whole(4, 5).requires_grad_()
        y = linear(x, weight, bias)
        gx, gw, gb = torch.autograd.grad(y.float().square().sum() / 8, (x, weight, bias), create_graph=True)
        (
            gx.float().square().sum() + (gw.float() * whole(3, 5, seed=9)).sum() + gb.float().square().sum()
        ).backward()
        results.append([t.float() for t in (gx, gw, gb, x.grad, weight.grad, bias.grad)])
    for got, wanted in zip(*results, strict=True):
        torch.testing.assert_close(got, wanted, rtol=2.0**-7, atol=2.0**-5)


def test_create_graph_after_the_weight_was_modified():
    """It would mix the weight of forward and today's: refused, where plain backward is right."""
    weight, bias = layer()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = functional.linear(whole(4, 5).requires_grad_(), weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(
        RuntimeError, match=r"\[linear\] weight was modified since forward.*Run backward before"
    ):
        torch.autograd.grad(y.sum(), weight, create_graph=True)
    y.sum().backward()  # as autocast's: with the weight of forward


def test_a_modified_16_bit_weight_is_refused_by_torch():
    weight, bias = Mode("grad_dtype").parameters()
    y = functional.linear(whole(4, 5).bfloat16().requires_grad_(), weight, bias)
    with torch.no_grad():
        weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("size", [5, 256])  # casts of large weights are shared
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, size, mode):
    weight, bias = mode.parameters(size, size)
    x, dy = whole(4, size), whole(4, size, seed=7)

    runs = []

    def block(x):
        runs.append(1)
        return mode.linear(mode.linear(x, weight, bias), weight, bias).float()

    results = []
    for _ in range(2):
        inner = x.clone().requires_grad_()
        for _ in range(2):
            y = block(inner) if not results else checkpoint(block, inner, use_reentrant=reentrant)
            y.backward(dy)
        results.append((inner.grad, weight.grad, bias.grad))
        weight.grad = bias.grad = None
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert len(runs) == 2 + 4  # of two passes; with checkpoint each runs forward twice


def test_without_the_engines_question(mode, monkeypatch):
    """A torch without the private function: gradients are returned, with the same values."""
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    weight, bias = mode.parameters(1, 1)
    for rows in (256, 1):
        mode.linear(torch.ones(rows, 1), weight, bias).sum().backward()
    assert weight.grad.item() == 257.0
    assert gradients._engine_runs(None) is None


def test_graphs_are_freed(mode):
    """The graph keeps the weight, not the other way round: no cycle."""
    weight, bias = mode.parameters()
    y = mode.linear(whole(4, 5), weight, bias)
    alive = weakref.ref(weight)
    gc.disable()
    try:
        y.sum().backward()
        del y, weight, bias
        assert alive() is None
    finally:
        gc.enable()


def test_saved_tensor_hooks(mode):
    """Activation offload: packed and unpacked tensors are used."""
    weight, bias = mode.parameters()
    x, dy = whole(4, 5).requires_grad_(), whole(4, 3, seed=7)
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t.clone(), lambda t: t):
        y = mode.linear(x, weight, bias)
    assert {t.dtype for t in packed} == {torch.bfloat16}
    y.backward(dy.bfloat16())
    wanted = reference(x.detach(), weight, bias, dy)
    assert torch.equal(weight.grad, wanted[1])
    assert torch.equal(x.grad.float(), wanted[0])


def test_undefined_output_gradient(mode):
    """An output that no loss depends on."""

    class Drop(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            return a.clone()

        @staticmethod
        def backward(ctx, g):
            return None

    weight, bias = mode.parameters()
    y = Drop.apply(mode.linear(whole(4, 5), weight, bias))
    y.sum().backward()
    assert weight.grad is None


def test_anomaly_mode(mode):
    weight, bias = mode.parameters(1, 1)
    with torch.autograd.set_detect_anomaly(True):
        for _ in range(2):
            mode.linear(torch.ones(2, 1), weight, bias).sum().backward()
    assert weight.grad.item() == 4.0
