"""Gradients of fusedamp.nn in ``.grad``: in FP32, added in place or returned.

Guards: sums that are rounded, gradients that are lost or counted twice, memory. Numbers are whole, so that
equality is exact.
"""

import copy
import threading

import fusedamp
import pytest
import torch
import torch.nn.functional as F
from fusedamp.nn import functional
from linear_modes import MODES, Mode, layer, reference, whole
from linear_reference import product
from on_device import DEVICE


@pytest.fixture(params=MODES)
def mode(request):
    return Mode(request.param)


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
