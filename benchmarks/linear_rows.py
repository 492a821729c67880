"""The rows of ``--linear``: one linear layer, MLPs, training steps and host time, with FLOPs and bytes.

Bytes are arithmetic over passes, r(ead) and w(ritten). Per element of an FP32 weight:

    forward              cast r4 w2, product r2 = 8
    input gradient       product r2
    weight gradient added to .grad
      ours, addmm        product r4 w4 = 8; w4 if there is none yet
      F.linear           product w2, cast r2 w4, add r4 r4 w4 = 20; 8 if there is none yet
      FP32 product, mm   product w4, add r4 r4 w4 = 16
    tanh-GELU            forward 6, backward and bias gradient 10, per element of the hidden layer

A product moves 2 bytes per element of its other matrices, 10 (r2 w4 r4, or w4 r4 w2) where it is FP32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import fusedamp.nn
import torch
import torch.nn.functional as F
from fusedamp.ops.linear import torch_is_fast
from torch import Tensor, nn

from .evidence.parts.training import Model, Size

Call = Callable[[], Tensor]  # returns a result, the same on both sides
Sides = tuple[Call, Call]  # ours, theirs
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
AMP, GRAD_DTYPE, COMPILED = "F.linear, AMP", "F.linear, grad_dtype", "torch.compile, AMP"
PRODUCT, MM, ADDMM = "FP32 product, add_", "mm(out_dtype), add_", "addmm(out_dtype)"
WEIGHT_GRAD = {AMP: 20, GRAD_DTYPE: 20, PRODUCT: 16, MM: 16, ADDMM: 8}  # bytes per element
SAME, UPCAST, FP16_ON_CPU, HOST = 0.99, 1 / 1.1, 8.0, 1 / 1.5  # least speedups
CHAIN, REUSED = 64, 16  # layers of a host time row; calls of one layer in an autocast region
ROUNDS = "torch multiplies in BF16 and rounds the gradient to 16 bits; ours is an unrounded FP32 product"
PYTHON = "an autograd function in Python, and checks, cost more than torch's in C++"
FEW = "with few rows, reading an FP32 copy of the weight costs more than the product"
CACHED = "finding the cast that autocast keeps takes host time in each call"


@dataclass(frozen=True)
class Layer:
    model: str
    m: int  # rows of the input
    n: int  # out_features
    k: int  # in_features

    @property
    def title(self) -> str:
        return f"{self.model}, {self.m:,} x {self.k:,} to {self.n:,}"

    @property
    def flops(self) -> float:
        return 2.0 * self.m * self.n * self.k


@dataclass(frozen=True)
class Row:
    what: str
    where: str
    dtype: torch.dtype
    rival: str
    make: Callable[[], Sides]
    flops: float
    our_bytes: float
    rival_bytes: float
    aim: float | None = None  # least speedup; None where the results differ by design
    why: str = ""  # the reason, if we are slower
    calls: int = 1  # of a layer: host time rows show the time of one
    roundings: int = 2  # to 16 bits, of both sides, that a result may differ by

    @property
    def name(self) -> str:
        return f"{self.what}, {self.where}, {SHORT[self.dtype]}, against {self.rival}"


SHORT = {BF16: "BF16", FP16: "FP16", FP32: "FP32"}


def rows(device: str, quick: bool) -> Iterator[Row]:
    """Yield the comparisons that run on ``device``."""
    for dtype in (BF16, FP16):
        for layer in layers(device, quick, dtype):
            yield from layer_rows(layer, dtype, device)
        yield from mlp_rows(layers(device, quick, dtype)[0], dtype, device, quick)
        yield from host_rows(dtype, device)
    for micro in (1, 8):
        yield step_row(micro, device, quick)
    layer = Layer("GPT-2 small", *((128, 768, 768) if not quick else (16, 64, 64)))
    for backward in (False, True):
        yield reused_row(layer, backward, device)
    yield fp32_row(layer, device)


def is_slow(device: str, dtype: torch.dtype) -> bool:
    """True for FP16 on a CPU without FP16 arithmetic."""
    return device == "cpu" and not torch_is_fast(torch.empty(0), dtype)


def layers(device: str, quick: bool, dtype: torch.dtype) -> list[Layer]:
    """List the up-projections of GPT-2 small, XL, and a model of 7e9 parameters; on CUDA all projections."""
    if quick:
        return [Layer("tiny", 48, 96, 64)]
    if device == "cuda":
        widths = {"GPT-2 small": (768, 3_072), "GPT-2 XL": (1_600, 6_400), "7e9": (4_096, 11_008)}
        return [
            Layer(model, m, n, k)
            for model, (width, inner) in widths.items()
            for n, k in ((inner, width), (width, inner), (3 * width, width), (width, width))
            for m in (1_024, 8_192)
        ]
    slow = is_slow(device, dtype)  # torch needs seconds for 1e9 multiplications
    small, xl = (128, 32) if slow else (1_024, 256)
    large = (1, 16, 128) if slow else (128,)
    shapes = [Layer("GPT-2 small", small, 3_072, 768), Layer("GPT-2 XL", xl, 6_400, 1_600)]
    return [*shapes, *(Layer("7e9", m, 11_008, 4_096) for m in large)]


def layer_rows(layer: Layer, dtype: torch.dtype, device: str) -> Iterator[Row]:
    """Yield the products of one layer against their rivals. FP16 aims at a multiple of torch's speed as a
    whole: torch's forward is less slow than its gradients."""
    m, n, k = layer.m, layer.n, layer.k
    slow = is_slow(device, dtype)
    our, upcast = (10 if slow else 2), (10 if device == "cpu" else 2)

    def row(what: str, rival: str, make: Any, ours: float, theirs: float, aim: float | None) -> Row:
        call = partial(make, layer, dtype, device, rival)
        why = FEW if slow else ""
        if upcast > our and rival in (AMP, GRAD_DTYPE) and make is weight_grad:
            why = ROUNDS
        flops = (3 if make is forward_backward else 1) * layer.flops
        return Row(what, layer.title, dtype, rival, call, flops, ours, theirs, aim, why)

    def moved(operand: int) -> tuple[int, int]:
        return operand * m * (n + k) + (6 + operand) * n * k, operand * (m * (n + k) + n * k)

    def added(operand: int, rival: str) -> int:
        return operand * m * (n + k) + WEIGHT_GRAD[rival] * n * k

    (our_forward, our_input), (forward_of, input_of) = moved(our), moved(2)
    yield row("forward", AMP, forward, our_forward, forward_of, SAME)
    if slow and layer.model == "7e9":
        return  # torch's gradients take up to a minute
    yield row("input gradient", AMP, input_grad, our_input, input_of, SAME)
    aims = {AMP: None, GRAD_DTYPE: None, PRODUCT: UPCAST}
    if device == "cuda":
        aims = {AMP: None, GRAD_DTYPE: None, MM: SAME, ADDMM: SAME}
    for rival, aim in aims.items():
        theirs = added(upcast if rival == PRODUCT else 2, rival)
        yield row("weight gradient, added", rival, weight_grad, added(upcast, ADDMM), theirs, aim)
    if slow:
        ours, theirs = sum(moved(our)) + added(our, ADDMM), sum(moved(2)) + added(2, AMP)
        yield row("forward + backward", AMP, forward_backward, ours, theirs, FP16_ON_CPU)


def randn(device: str, dtype: torch.dtype, *shape: int) -> Tensor:
    draw = torch.Generator(device).manual_seed(1)
    return torch.randn(shape, generator=draw, device=device).to(dtype)


def both(side: Callable[[Any], Call], module: nn.Module, device: str) -> Sides:
    """Return the side of the converted module, and of the plain one; with the same weights."""
    theirs = module.to(device)
    return side(fusedamp.nn.convert(copy.deepcopy(theirs))), side(theirs)


def forward(layer: Layer, dtype: torch.dtype, device: str, _: str = AMP) -> Sides:
    x = randn(device, dtype, layer.m, layer.k).requires_grad_()

    def side(module: nn.Module) -> Call:
        def call() -> Tensor:
            with torch.autocast(device, dtype):
                return module(x)

        return call

    return both(side, nn.Linear(layer.k, layer.n, device=device), device)


def input_grad(layer: Layer, dtype: torch.dtype, device: str, _: str = AMP) -> Sides:
    x = randn(device, dtype, layer.m, layer.k).requires_grad_()
    grad = randn(device, dtype, layer.m, layer.n)

    def side(module: nn.Module) -> Call:
        with torch.autocast(device, dtype):
            y = module.requires_grad_(False)(x)
        return lambda: torch.autograd.grad(y, x, grad, retain_graph=True)[0]

    return both(side, nn.Linear(layer.k, layer.n, bias=False, device=device), device)


def weight_grad(layer: Layer, dtype: torch.dtype, device: str, rival: str) -> Sides:
    """Return backward passes that add to an FP32 ``weight.grad``, or torch's operations for the same."""
    x, grad = randn(device, dtype, layer.m, layer.k), randn(device, dtype, layer.m, layer.n)

    def side(module: Any) -> Call:
        if rival == GRAD_DTYPE:
            module = module.to(dtype)
            module.weight.grad_dtype = FP32
        module.weight.grad = torch.zeros(layer.n, layer.k, device=device)
        with torch.autocast(device, dtype):
            y = module(x)

        def call() -> Tensor:
            y.backward(grad, retain_graph=True)
            return module.weight.grad

        return call

    acc = torch.zeros(layer.n, layer.k, device=device)

    def products() -> Tensor:
        nonlocal acc
        if rival == ADDMM:
            acc = torch.addmm(acc, grad.t(), x, out_dtype=FP32)
        elif rival == MM:
            acc.add_(torch.mm(grad.t(), x, out_dtype=FP32))
        else:
            acc.add_(grad.float().t() @ x.float())
        return acc

    ours, theirs = both(side, nn.Linear(layer.k, layer.n, bias=False, device=device), device)
    return ours, theirs if rival in (AMP, GRAD_DTYPE) else products


def trained(module: Any, x: Tensor, dtype: torch.dtype, times: int = 1) -> Call:
    """Return a forward and backward pass that adds to existing gradients. ``times``: calls of the module in
    one autocast region."""
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    kept = next(module.parameters())

    def call() -> Tensor:
        with torch.autocast(x.device.type, dtype, enabled=dtype is not FP32):
            loss = torch.stack([module(x).float().sum() for _ in range(times)]).sum()
        loss.backward()
        return kept.grad

    return call


def forward_backward(layer: Layer, dtype: torch.dtype, device: str, _: str = AMP) -> Sides:
    x = randn(device, dtype, layer.m, layer.k).requires_grad_()
    return both(lambda module: trained(module, x, dtype), nn.Linear(layer.k, layer.n, device=device), device)


def mlp_rows(layer: Layer, dtype: torch.dtype, device: str, quick: bool) -> Iterator[Row]:
    """Yield forward and backward of GPT-2's MLP, against plain modules and their compilation."""
    m, n, k = layer.m, layer.n, layer.k
    slow, width = is_slow(device, dtype), torch.finfo(dtype).bits
    our, upcast = (10 if slow else 2), (10 if device == "cpu" else 2)

    def moved(product: int, weight_grad: int, per_weight: int) -> float:
        products = 2 * (2 * product + weight_grad) * m * (n + k) + 2 * (6 + 2 * product + per_weight) * n * k
        return products + width * m * n  # GELU: 6 + 10 bytes

    def make(rival: str) -> Sides:
        x = randn(device, dtype, m, k).requires_grad_()
        first, second = nn.Linear(k, n, device=device), nn.Linear(n, k, device=device)
        plain = nn.Sequential(first, nn.GELU("tanh"), second)
        ours: Any = fusedamp.nn.MLP(k, n, device=device)
        for mine, its in zip(ours.parameters(), plain.parameters(), strict=True):
            mine.data.copy_(its.data)
        theirs = torch.compile(plain) if rival == COMPILED else plain
        return trained(ours, x, dtype), trained(theirs, x, dtype)

    where = f"{layer.title} to {k:,}"
    # Compiling takes longer than a quick run.
    for rival in (AMP,) if quick or slow else (AMP, COMPILED):
        yield Row(
            "MLP, forward + backward",
            where,
            dtype,
            rival,
            partial(make, rival),
            6 * layer.flops,
            moved(our, upcast, 8),
            moved(2, 2, 20),
            FP16_ON_CPU if slow else None,
            ROUNDS if upcast > our else "",
            roundings=16,  # input, hidden layer, GELU, output, and their gradients
        )


def host_rows(dtype: torch.dtype, device: str) -> Iterator[Row]:
    """Yield a chain of layers that are too small for products to matter."""
    width, batch = 8, 4

    def make(backward: bool) -> Sides:
        x = randn(device, dtype, batch, width).requires_grad_()

        def side(module: nn.Module) -> Call:
            def call() -> Tensor:
                with torch.autocast(device, dtype):
                    return module(x)

            return trained(module, x, dtype) if backward else call

        return both(side, nn.Sequential(*(nn.Linear(width, width) for _ in range(CHAIN))), device)

    for backward in (False, True):
        what = f"host time, forward{' + backward' if backward else ''}"
        where, numel = f"{CHAIN} layers, {batch} x {width} to {width}", CHAIN * width * width
        flops, moved = (3 if backward else 1) * 2.0 * batch * numel, (30 if backward else 8) * numel
        call = partial(make, backward)
        yield Row(what, where, dtype, AMP, call, flops, moved, moved, HOST, PYTHON, CHAIN, 4 * CHAIN)


def step_row(micro: int, device: str, quick: bool) -> Row:
    """Return a training step of a GPT under BF16 autocast, with torch's AdamW on both sides. FLOPs and bytes
    are those of the linear weights."""
    size = Size(50_304, 1_024, 768, 12, 12, 8, 0) if device == "cuda" else Size(1_024, 128, 384, 6, 4, 4, 0)
    if quick:
        size = Size(64, 16, 32, 2, 1, 2, 0)
    shape = (size.batch, size.context + 1)
    weights = 12 * size.layers * size.width**2

    def make() -> Sides:
        draw = torch.Generator().manual_seed(1)
        batches = [torch.randint(size.vocabulary, shape, generator=draw).to(device) for _ in range(micro)]

        def side(model: Any) -> Call:
            optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

            def call() -> Tensor:
                optimizer.zero_grad()
                for tokens in batches:
                    with torch.autocast(device, BF16):
                        logits = model(tokens[:, :-1])
                        loss = F.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
                    (loss / micro).backward()
                optimizer.step()
                return model.blocks[0].qkv.weight.grad

            return call

        return both(side, Model(size), device)

    tokens = size.batch * size.context
    where = f"GPT of {size.layers} layers, width {size.width}, {tokens:,} tokens"
    what = f"training step, {micro} micro-batch{'es' if micro > 1 else ''}"
    ours, theirs = ((10 + later) * micro + first - later for first, later in ((4, 8), (8, 20)))
    flops = 6.0 * weights * tokens * micro
    why = ROUNDS if device == "cpu" else ""
    return Row(what, where, BF16, AMP, make, flops, ours * weights, theirs * weights, None, why, roundings=64)


def reused_row(layer: Layer, backward: bool, device: str) -> Row:
    """Return one layer that is called several times in an autocast region."""

    def make() -> Sides:
        x = randn(device, BF16, layer.m, layer.k).requires_grad_()

        def side(module: nn.Module) -> Call:
            def call() -> Tensor:
                with torch.autocast(device, BF16):
                    return torch.stack([module(x) for _ in range(REUSED)])

            return trained(module, x, BF16, REUSED) if backward else call

        return both(side, nn.Linear(layer.k, layer.n, device=device), device)

    what = f"{REUSED} calls in one region, forward{' + backward' if backward else ''}"
    weight, products = layer.n * layer.k, 2 * layer.m * (layer.n + layer.k)
    upcast = 10 if device == "cpu" else 2
    ours, theirs = REUSED * (8 * weight + products), (6 + 2 * REUSED) * weight + REUSED * products
    if backward:
        ours += REUSED * (10 * weight + products + upcast * products // 2)
        theirs += REUSED * (22 * weight + 2 * products)
    flops = (3 if backward else 1) * REUSED * layer.flops
    why = f"{CACHED}; {ROUNDS}" if backward and device == "cpu" else CACHED
    return Row(what, layer.title, BF16, AMP, make, flops, ours, theirs, None, why, roundings=2 * REUSED)


def fp32_row(layer: Layer, device: str) -> Row:
    moved = 12 * layer.m * (layer.n + layer.k) + (4 + 4 + 16) * layer.n * layer.k
    what, rival = "forward + backward", "F.linear, no autocast"
    make = partial(forward_backward, layer, FP32, device)
    return Row(what, layer.title, FP32, rival, make, 3 * layer.flops, moved, moved, SAME)
