"""How gradients of fusedamp.nn reach ``.grad``: in FP32, in place where nothing stands between, whatever
autograd does.

Guards: sums that are not rounded, hooks that see gradients, gradients that are lost or counted twice, memory.
Each case is compared with plain FP32 layers on numbers that all formats hold, so that equality is exact.
"""

import copy
import gc
import threading
import weakref

import fusedamp
import pytest
import torch
import torch.nn.functional as F
from fusedamp.nn import autograd, functional
from linear_reference import product
from on_device import DEVICE
from torch.utils.checkpoint import checkpoint


def whole(*shape, seed=0):
    """Small whole numbers: every product and sum is exact in all formats up to 256."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def layer(k=5, n=3, seed=1):
    weight, bias = torch.nn.Parameter(whole(n, k, seed=seed)), torch.nn.Parameter(whole(n, seed=seed + 1))
    return weight, bias


class Mode:
    """FP32 weights under autocast, or 16-bit weights with FP32 gradients."""

    def __init__(self, name):
        self.name = name

    def parameters(self, *args):
        made = layer(*args)
        if self.name == "autocast":
            return made
        made = [torch.nn.Parameter(p.detach().bfloat16()) for p in made]
        for p in made:
            p.grad_dtype = torch.float32
        return made

    def linear(self, x, weight, bias=None):
        if self.name == "autocast":
            with torch.autocast(DEVICE, dtype=torch.bfloat16):
                return functional.linear(x, weight, bias)
        return functional.linear(x.bfloat16(), weight, bias)


@pytest.fixture(params=["autocast", "grad_dtype"])
def mode(request):
    return Mode(request.param)


def reference(x, weight, bias, dy):
    """Gradients of x, weight and bias."""
    return dy @ weight.detach().float(), dy.t() @ x, dy.sum(0)


def test_257_rows_of_ones():
    """The number that torch's autocast gets wrong: 256."""
    for linear, wanted in ((F.linear, 256.0), (functional.linear, 257.0)):
        weight, bias = torch.nn.Parameter(torch.ones(1, 1)), torch.nn.Parameter(torch.ones(1))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = linear(torch.ones(257, 1, device="cpu"), weight.cpu(), bias.cpu())
        y.backward(torch.ones_like(y))
        if DEVICE == "cpu":
            assert (weight.grad.item(), bias.grad.item()) == (wanted, wanted)


def test_one_after_256(mode):
    weight, bias = mode.parameters(1, 1)
    for rows in (256, 1):
        mode.linear(torch.ones(rows, 1), weight, bias).sum().backward()
    assert (weight.grad.item(), bias.grad.item()) == (257.0, 257.0)
    assert weight.grad.dtype is bias.grad.dtype is torch.float32


def test_64_micro_batches(mode):
    """Random numbers, against float64; in place from the second on."""
    weight, bias = mode.parameters(33, 17)
    xs = [torch.randn(13, 33, generator=torch.Generator().manual_seed(i)).bfloat16() for i in range(64)]
    dys = [torch.randn(13, 17, generator=torch.Generator().manual_seed(99 + i)).bfloat16() for i in range(64)]
    for x, dy in zip(xs, dys, strict=True):
        mode.linear(x, weight, bias).backward(dy)
    product(torch.cat(dys).t(), torch.cat(xs)).check(weight.grad, "weight grad")


def test_in_place(mode):
    """.grad stays the same tensor in the same memory, and its version moves; post-accumulate hooks run."""
    weight, bias = mode.parameters()
    x, dy = whole(4, 5), whole(4, 3, seed=7)
    seen = []
    weight.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    mode.linear(x, weight, bias).backward(dy.bfloat16())
    grad, address, version = weight.grad, weight.grad.data_ptr(), weight.grad._version
    mode.linear(x, weight, bias).backward(dy.bfloat16())
    assert weight.grad is grad
    assert grad.data_ptr() == address
    assert grad._version > version
    assert torch.equal(grad, 2 * reference(x, weight, bias, dy)[1])
    assert torch.equal(torch.stack(seen), torch.stack([grad / 2, grad]))


def test_nothing_of_the_weights_shape_is_allocated(mode):
    """Beside .grad itself: a weight of 4 MB, operands of 64 KB."""
    weight, _ = mode.parameters(1024, 1024)
    x, dy = torch.ones(8, 1024), torch.ones(8, 1024).bfloat16()
    peaks = []
    for _ in range(3):
        y = mode.linear(x, weight)
        with torch.profiler.profile(
            profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]
        ) as log:
            y.backward(dy)
        field = "self_cpu_memory_usage"
        peaks.append(max((getattr(e, field) for e in log.events() if getattr(e, field) > 0), default=0))
    if DEVICE == "cpu":
        assert peaks[0] >= 1024 * 1024 * 4  # the gradient itself
        assert max(peaks[1:]) < 1024 * 1024


HOOKS = {"halves": lambda g: g / 2, "looks": lambda g: None}


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


@pytest.mark.parametrize("seeded", [False, True], ids=["first", "later"])
def test_tied_weights(seeded, mode):
    """One weight in two layers, and in an embedding."""
    weight, _ = mode.parameters(4, 4)
    other = weight.detach().clone().float().requires_grad_()
    x, index, dy = whole(6, 4), torch.tensor([0, 3, 3, 1, 0, 0]), whole(6, 4, seed=5)

    def loss(linear, w):
        hidden = linear(x, w)
        y = linear(hidden, w) + F.embedding(index, w)
        return (y.float() * dy).sum()

    for _ in range(2 if seeded else 1):
        loss(mode.linear, weight).backward()
        loss(F.linear, other).backward()
    assert torch.equal(weight.grad.float(), other.grad)


def test_sparse_gradients_of_a_tied_embedding():
    """.grad is sparse then; a product cannot add to it in place."""
    weight, _ = layer(4, 4)
    F.embedding(torch.tensor([1, 2]), weight, sparse=True).sum().backward()
    assert weight.grad.is_sparse
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = functional.linear(torch.ones(3, 4), weight)
    y.sum().backward()
    wanted = torch.full((4, 4), 3.0)
    wanted[1:3] += 1
    assert torch.equal(weight.grad.to_dense(), wanted)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpoint(reentrant, mode):
    weight, bias = mode.parameters(5, 5)
    x, dy = whole(4, 5), whole(4, 5, seed=7)

    def block(x):
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


def test_other_kinds_of_grad_are_returned_to(mode):
    """A .grad that is transposed, or that belongs to a graph, is torch's to add to."""
    x, dy = whole(4, 5), whole(4, 3, seed=7)
    for make in (lambda: torch.ones(5, 3).t(), lambda: torch.ones(3, 5).requires_grad_()):
        weight, bias = mode.parameters()
        weight.grad = make()
        mode.linear(x, weight, bias).backward(dy.bfloat16())
        assert torch.equal(weight.grad.detach(), 1 + reference(x, weight, bias, dy)[1])


def test_grad_set_to_none_between(mode):
    weight, bias = mode.parameters()
    x, dy = whole(4, 5), whole(4, 3, seed=7)
    for _ in range(3):
        mode.linear(x, weight, bias).backward(dy.bfloat16())
        assert torch.equal(weight.grad, reference(x, weight, bias, dy)[1])
        weight.grad = None


def test_a_hook_that_steps_and_frees(mode):
    """Optimizer in backward: .grad is None after each."""
    weight, bias = mode.parameters(1, 1)
    total = []

    def step(p):
        total.append(p.grad.item())
        p.grad = None

    weight.register_post_accumulate_grad_hook(step)
    for rows in (3, 4):
        mode.linear(torch.ones(rows, 1), weight, bias).sum().backward()
    assert total == [3.0, 4.0]


def test_without_the_engines_question(mode, monkeypatch):
    """A torch without the private function: gradients are returned, with the same values."""
    monkeypatch.delattr(torch._C, "_will_engine_execute_node")
    weight, bias = mode.parameters(1, 1)
    for rows in (256, 1):
        mode.linear(torch.ones(rows, 1), weight, bias).sum().backward()
    assert weight.grad.item() == 257.0
    assert autograd._engine_runs(weight) is None


@pytest.mark.cuda
@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_another_stream_returns_the_gradient(mode):
    weight, bias = mode.parameters(1, 1)
    for _ in range(2):
        with torch.cuda.stream(torch.cuda.Stream()):
            mode.linear(torch.ones(2, 1), weight, bias).sum().backward()
        torch.cuda.synchronize()
    assert weight.grad.item() == 4.0


def test_threads_with_layers_of_their_own(mode):
    def work(results, i):
        weight, bias = mode.parameters(5, 3, i)
        x, dy = whole(4, 5, seed=i), whole(4, 3, seed=i + 50)
        for _ in range(5):
            mode.linear(x, weight, bias).backward(dy.bfloat16())
        results[i] = torch.equal(weight.grad, 5 * reference(x, weight, bias, dy)[1])

    results = [None] * 4
    threads = [threading.Thread(target=work, args=(results, i)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == [True] * 4


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


def test_a_copy_of_a_model_has_gradients_of_its_own(mode):
    module = fusedamp.nn.Linear(1, 1, grad_dtype=torch.float32 if mode.name == "grad_dtype" else None)
    if mode.name == "grad_dtype":
        module.bfloat16()
    one, two = module, copy.deepcopy(module)
    for m, rows in ((one, 3), (two, 257), (two, 2)):
        x = torch.ones(rows, 1)
        with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=mode.name == "autocast"):
            m(x if mode.name == "autocast" else x.bfloat16()).sum().backward()
    assert one.weight.grad.item() == 3.0
    assert two.weight.grad.item() == 259.0
