"""Linear layers on the device: products against float64, accumulation, same bits in runs and graphs.

Bounds of a sum of n products in FP32: 2 (n + 2) 2^-24 sum |products|, and half a unit of a 16-bit result.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import fusedamp.nn
import torch
from fusedamp.ops import linear as ops
from torch import Tensor, nn

from ..borrowed import differing, mixed
from ..place import Place
from .sync import alarmed

DTYPES = (torch.bfloat16, torch.float16)
SIZES = [
    (1, 1, 1),
    (5, 7, 3),
    (1, 64, 32),
    (33, 65, 257),
    (64, 64, 64),
    (257, 129, 1),
    (200, 136, 1_000),
]  # m n k
TANH = 2.0**-10.9  # relative error of the device's tanh (PTX ISA, tanh.approx.f32: 2^-10.987)
SLOPE = 1.13  # the largest of GELU
RUNS, MICRO_BATCHES = 100, 64
Check = tuple[Tensor, Tensor, Tensor]  # result, float64 reference, bound


def unit(reference: Tensor, dtype: torch.dtype) -> Tensor:
    """Return half a unit in the last place of ``dtype``."""
    about = torch.finfo(dtype)
    return reference.abs().clamp_min(about.smallest_normal) * about.eps / 2


def product(a: Tensor, b: Tensor, start: Tensor | float = 0.0) -> tuple[Tensor, Tensor]:
    """Return ``a @ b + start`` in float64, and the bound of the same in FP32."""
    start = start if isinstance(start, float) else start.double()
    size = a.double().abs() @ b.double().abs() + abs(start)
    return a.double() @ b.double() + start, 2 * (a.shape[1] + 2) * 2.0**-24 * size


def gelu_parts(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return GELU, its derivative, and the derivative's error if tanh has the error ``TANH``."""
    inner = x.clone().requires_grad_()
    y = nn.functional.gelu(inner, approximate="tanh")
    (slope,) = torch.autograd.grad(y.sum(), inner)
    argument = 0.7978845608 * x * (1 + 3 * 0.044715 * x * x)
    return y.detach(), slope, TANH * (0.5 + argument.abs())


def values(m: int, n: int, k: int, dtype: torch.dtype, device: str) -> Iterator[tuple[str, Check]]:
    """Yield the ops' results for one size, with references and bounds."""
    draw = torch.Generator().manual_seed(m + n + k)
    x, weight, grad, bias, back = (
        torch.randn(shape, generator=draw).to(dtype) for shape in ((m, k), (n, k), (m, n), (n,), (m, k))
    )
    acc = torch.randn(n, k, generator=draw)
    dx, dweight, dgrad, dbias, dback = (t.to(device) for t in (x, weight, grad, bias, back))
    pre, pre_bound = product(x, weight.t(), bias)
    pre_bound = pre_bound + unit(pre, dtype)
    yield "linear", (ops.linear(dx, dweight, dbias), pre, pre_bound)
    y, got_pre = ops.linear_gelu(dx, dweight, dbias)
    gelu, _, _ = gelu_parts(pre)
    yield "linear_gelu, pre", (got_pre, pre, pre_bound)
    yield "linear_gelu", (y, gelu, SLOPE * pre_bound + pre.abs() * TANH / 2 + unit(gelu, dtype))
    into, into_bound = product(grad, weight)
    into_bound = into_bound + unit(into, dtype)
    yield "linear_input_grad", (ops.linear_input_grad(dgrad, dweight), into, into_bound)
    _, slope, slope_bound = gelu_parts(back.double())
    wanted = into * slope
    bound = into_bound * (slope.abs() + slope_bound) + into.abs() * slope_bound + unit(wanted, dtype)
    for kind in (torch.float32, dtype):
        got, sums = ops.linear_gelu_input_grad(dgrad, dweight, dback, bias_grad=True, bias_dtype=kind)
        yield "linear_gelu_input_grad", (got, wanted, bound)
        total, summed = wanted.sum(0), 2 * (m + 2) * 2.0**-24 * wanted.abs().sum(0) + bound.sum(0)
        yield "its bias gradient", (sums, total, summed + (unit(total, dtype) if kind is dtype else 0))
    for kind in (torch.float32, dtype):
        half = kind is dtype
        wanted, bound = product(grad.t(), x)
        got, sums = ops.linear_weight_grad(dgrad, dx, dtype=kind, bias_grad=True)
        yield f"linear_weight_grad, {kind}", (got, wanted, bound + (unit(wanted, dtype) if half else 0))
        total, bound = product(grad.t(), torch.ones(m, 1))
        yield "bias gradient", (sums, total[:, 0], (bound + (unit(total, dtype) if half else 0))[:, 0])
    wanted, bound = product(grad.t(), x, acc)
    here = acc.to(device, copy=True)
    ops.linear_weight_grad_(here, dgrad, dx, bias_grad=False)
    yield "linear_weight_grad_", (here, wanted, bound)
    before, later = acc.to(device, copy=True), (dgrad[1:], dx[1:])  # off by one row: another alignment
    sums = ops.linear_weight_grad_(before, *later, bias_grad=True)
    yield "linear_weight_grad_, sliced", (before, *product(grad[1:].t(), x[1:], acc))
    total, bound = product(grad[1:].t(), torch.ones(m - 1, 1))
    yield "bias gradient, sliced", (sums, total[:, 0], bound[:, 0])


def need_within(name: str, check: Check) -> None:
    got, wanted, bound = check
    error = (got.detach().cpu().double() - wanted).abs()
    over = ~(error <= bound)
    assert not over.any(), f"{name}: {int(over.sum())} of {over.numel()}, error {float(error.max()):.3g}"


def accumulated(place: Place) -> None:
    """Check the sums that 16 bits would lose, and that they arrive in the ``.grad`` that was there."""
    layer = fusedamp.nn.Linear(8, 8, bias=True, device=place.device)
    ones = torch.ones(257, 8, device=place.device)
    for micro in ([257], [256, 1]):
        zeroed(layer)
        held = layer.weight.grad
        for count in micro:
            with torch.autocast(place.device, torch.bfloat16):
                layer(ones[:count]).sum().backward()
        assert layer.weight.grad is held, "weight.grad was replaced"
        for grad in gradients(layer):
            assert bool((grad == 257).all()), f"{micro} rows of ones: {grad.flatten()[0].item()}"


def micro_batches(place: Place, dtype: torch.dtype) -> None:
    """Check the sum of many micro-batches against float64, hooks, and gradients that are not asked for."""
    torch.manual_seed(0)
    layer = fusedamp.nn.Linear(72, 40, bias=False, device=place.device)
    fired = []
    layer.weight.register_post_accumulate_grad_hook(lambda _: fired.append(1))
    wanted, bound = torch.zeros(40, 72).double(), torch.zeros(40, 72).double()
    for _ in range(MICRO_BATCHES):
        x, grad = torch.randn(24, 72).to(dtype), torch.randn(24, 40).to(dtype)
        with torch.autocast(place.device, dtype):
            layer(x.to(place.device)).backward(grad.to(place.device))
        wanted, more = product(grad.t(), x, wanted)
        bound = bound + more
    need_within(f"{MICRO_BATCHES} micro-batches", (layer.weight.grad, wanted, bound))
    assert len(fired) == MICRO_BATCHES, f"{len(fired)} post-accumulate hooks ran"
    kept = layer.weight.grad.clone()
    x = torch.randn(3, 72, device=place.device, requires_grad=True)
    with torch.autocast(place.device, dtype):
        layer(x).sum().backward(inputs=[x])
        torch.autograd.grad(layer(x).sum(), layer.weight)
    assert torch.equal(layer.weight.grad, kept), "a gradient that was not asked for was added"


def memory(place: Place) -> dict[str, int]:
    """Return the bytes allocated beyond the operands; the weight's are more than the largest workspace."""
    size = place.sized(4_096, 64)
    grad, x = (torch.randn(64, size, device=place.device).bfloat16() for _ in range(2))
    acc = torch.zeros(size, size, device=place.device)
    ops.linear_weight_grad_(acc, grad, x, bias_grad=False)
    if place.device != "cuda":
        return {}
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.linear_weight_grad_(acc, grad, x, bias_grad=False)
    most = torch.cuda.max_memory_allocated() - before
    assert most < acc.nbytes, f"{most} bytes beside a weight of {acc.nbytes}"
    return {"weight_bytes": acc.nbytes, "allocated_bytes": most}


def model(place: Place) -> Any:
    torch.manual_seed(0)
    width = place.sized(512, 16)
    return nn.Sequential(fusedamp.nn.Linear(width, width), fusedamp.nn.MLP(width, 4 * width)).to(place.device)


def backward(place: Place, layers: Any, xs: list[Tensor]) -> Callable[[], None]:
    """Return forward and backward of some micro-batches, which add to the gradients."""

    def run() -> None:
        for x in xs:
            with torch.autocast(place.device, torch.bfloat16):
                loss = layers(x).float().square().mean()
            loss.backward()

    return run


def gradients(layers: Any) -> list[Tensor]:
    return [parameter.grad for parameter in layers.parameters()]


def zeroed(layers: Any) -> None:
    for parameter in layers.parameters():
        parameter.grad = torch.zeros_like(parameter)


def same_bits(place: Place) -> None:
    """Check that runs, a second stream, and replays of a graph give the same bits; and that nothing syncs."""
    first = model(place)
    width = first[0].in_features
    xs = [torch.randn(place.sized(1_024, 8), width, device=place.device) for _ in range(3)]
    others = [copy.deepcopy(first) for _ in range(3)]
    for layers in (first, *others):
        zeroed(layers)
    backward(place, first, xs)()
    wanted = [grad.clone() for grad in gradients(first)]
    with alarmed(place):
        for _ in range(place.sized(RUNS, 3)):
            zeroed(first)
            backward(place, first, xs)()
    assert not (found := differing(gradients(first), wanted)), f"last of {RUNS} runs: {found[:3]}"
    if place.device != "cuda":
        return
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(3):
        for stream, layers in zip(streams, others, strict=False):
            with torch.cuda.stream(stream):
                zeroed(layers)
                backward(place, layers, xs)()
    torch.cuda.synchronize()
    for layers in others[:2]:
        apart = [float((a - b).norm() / b.norm()) for a, b in zip(gradients(layers), wanted, strict=True)]
        assert max(apart) < 1e-5, f"on a second stream, where gradients are returned: {apart}"
    graphed = others[2]
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # as torch asks for: a warm-up on another stream
        backward(place, graphed, xs)()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backward(place, graphed, xs)()
    for _ in range(5):
        for grad in gradients(graphed):
            grad.zero_()
        graph.replay()
        torch.full((1 << 20,), float("nan"), device=place.device)  # overwrites freed memory
    assert not (found := differing(gradients(graphed), wanted)), f"replays: {found[:3]}"


def run(place: Place) -> None:
    jobs = [(size, dtype) for size in place.sized(SIZES, SIZES[:4]) for dtype in DTYPES]
    for (m, n, k), dtype in place.all_in_time(mixed(jobs), spare=25 if not place.rehearse else 5):
        for name, check in values(m, n, k, dtype, place.device):
            with place.attempt(f"{m} x {n} x {k} {dtype} {name}"):
                need_within(name, check)
    for fused in (False, True):
        with fusedamp.nn.fusions(bias_grad=fused, gelu=fused, gelu_grad=fused):
            with place.attempt(f"256 + 1 = 257, fused {fused}"):
                accumulated(place)
            for dtype in DTYPES:
                with place.attempt(f"micro-batches {dtype}, fused {fused}"):
                    micro_batches(place, dtype)
            with place.attempt(f"same bits, fused {fused}"):
                same_bits(place)
    with place.attempt("nothing of the weight's shape is allocated"):
        place.note("memory", memory(place))
    place.note("uses", ops.product_uses())
