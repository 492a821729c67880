"""Linear layers: which plans cuBLASLt has, which fusions are faster, a training step, and rivals.

The last finding, ``measured``, is the line for ``MEASURED`` in python/fusedamp/nn/fusions.py.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from math import ceil
from statistics import median
from typing import Any

import fusedamp.nn
import torch
from fusedamp.nn.fusions import KINDS
from fusedamp.ops import linear as ops
from torch import Tensor, nn
from torch.nn import functional

from ...linear_rows import AMP, COMPILED, SHORT, WEIGHT_GRAD, Layer, layers, rows
from ..clock import Call, Clock
from ..place import Place
from .training import GPT2, OPTIONS, TINY, Model

DTYPES = (torch.bfloat16, torch.float16)
WINDOW_MS = 0.2  # a sample repeats a call for so long
PAIRS, FEWER = 7, 3
FASTER, NOT_SLOWER = 1.02, 0.99  # at every shape of the benchmark; at any other
OTHERS = [
    Layer("small", 256, 768, 768),
    Layer("uneven", 1_000, 1_016, 504),
    Layer("large", 4_096, 5_120, 1_280),
]
ALIGNMENTS = (2, 4, 8, 16, 32, 64, 128, 256)
MICRO_BATCHES = 8


def randn(place: Place, dtype: torch.dtype, *shape: int, alignment: int = 256) -> Tensor:
    """Return a matrix whose address is a multiple of ``alignment`` and of nothing larger."""
    numel, offset = torch.Size(shape).numel(), alignment // 2 % 128
    return torch.randn(numel + 128, device=place.device).to(dtype)[offset : offset + numel].view(shape)


def fused_ops(place: Place, layer: Layer, dtype: torch.dtype, alignment: int) -> dict[str, Call]:
    """Return a call of each op that cuBLASLt has to have a plan for."""
    m, n, k = layer.m, layer.n, layer.k

    def tensor(*shape: int) -> Tensor:
        return randn(place, dtype, *shape, alignment=alignment)

    x, weight, bias, grad, pre = tensor(m, k), tensor(n, k), tensor(n), tensor(m, n), tensor(m, k)
    acc = torch.zeros(n, k, device=place.device)
    return {
        "linear_gelu": lambda: ops.linear_gelu(x, weight, bias),
        "linear_gelu_input_grad": lambda: ops.linear_gelu_input_grad(
            grad, weight, pre, bias_grad=False, bias_dtype=torch.float32
        ),
        "linear_gelu_input_grad, bias": lambda: ops.linear_gelu_input_grad(
            grad, weight, pre, bias_grad=True, bias_dtype=dtype
        ),
        "linear_weight_grad, 16 bits, bias": lambda: ops.linear_weight_grad(
            grad, x, dtype=dtype, bias_grad=True
        ),
        "linear_weight_grad, FP32": lambda: ops.linear_weight_grad(
            grad, x, dtype=torch.float32, bias_grad=False
        ),
        "linear_weight_grad, FP32, bias": lambda: ops.linear_weight_grad(
            grad, x, dtype=torch.float32, bias_grad=True
        ),
        "linear_weight_grad_": lambda: ops.linear_weight_grad_(acc, grad, x, bias_grad=False),
        "linear_weight_grad_, bias": lambda: ops.linear_weight_grad_(acc, grad, x, bias_grad=True),
    }


def refused_since(before: list[ops.ProductUse]) -> str:
    """Return what cuBLASLt refused since ``before``, and why."""
    uses = [use for use in ops.product_uses() if use.refused and use not in before]
    return "; ".join(f"{use.epilogue}, {use.inputs} to {use.output}: {use.refused}" for use in uses)


def plans(place: Place) -> Iterator[dict[str, Any]]:
    """Yield what each op needed or was refused: at every alignment, and with odd rows."""
    even = place.sized(Layer("", 512, 1_024, 768), Layer("", 8, 16, 24))
    odd = Layer("", even.m, even.n + 1, even.k + 1)
    for dtype in DTYPES:
        for layer, alignment in [*((even, a) for a in ALIGNMENTS), (odd, 256)]:
            for op, call in fused_ops(place, layer, dtype, alignment).items():
                before, start = ops.product_uses(), 0
                if place.device == "cuda":
                    torch.cuda.reset_peak_memory_stats()
                    start = torch.cuda.memory_allocated()
                kept = call()
                most = torch.cuda.max_memory_allocated() - start if place.device == "cuda" else 0
                results = kept if isinstance(kept, tuple) else (kept,)
                yield {
                    "op": op,
                    "dtype": SHORT[dtype],
                    "alignment": alignment,
                    "m n k": (layer.m, layer.n, layer.k),
                    "refused": refused_since(before),
                    "workspace": max(0, most - sum(t.nbytes for t in results)),
                }


def pair(place: Place, kind: str, layer: Layer, dtype: torch.dtype) -> tuple[Call, Call]:
    """Return a kind of fusion, and what runs in its place: as in fusedamp.nn, with FP32 parameters."""
    m, n, k = layer.m, layer.n, layer.k
    x, weight, bias, grad = (randn(place, dtype, *shape) for shape in ((m, k), (n, k), (n,), (m, n)))
    acc = torch.zeros(n, k, device=place.device)
    if kind == "bias_grad":

        def bias_grad() -> None:
            ops.linear_weight_grad_(acc, grad, x, bias_grad=False)
            grad.sum(0, dtype=torch.float32)

        return lambda: ops.linear_weight_grad_(acc, grad, x, bias_grad=True), bias_grad
    if kind == "gelu":
        return (
            lambda: ops.linear_gelu(x, weight, bias),
            lambda: functional.gelu(ops.linear(x, weight, bias), approximate="tanh"),
        )
    back, pre = weight.t().contiguous(), grad  # the second layer's weight; any values do

    def gelu_grad() -> None:
        inner = torch.ops.aten.gelu_backward(ops.linear_input_grad(x, back), pre, approximate="tanh")
        inner.sum(0, dtype=torch.float32)

    return (
        lambda: ops.linear_gelu_input_grad(x, back, pre, bias_grad=True, bias_dtype=torch.float32),
        gelu_grad,
    )


def speedup(clock: Clock, ours: Call, theirs: Call, pairs: int) -> float:
    """Return the median of pairs of windows of the device's time: theirs / ours."""

    def repeated(call: Call, times: int) -> Callable[[], None]:
        def run() -> None:
            for _ in range(times):
                call()

        return run

    for call in (ours, theirs):
        call()
    times = min(20, ceil(WINDOW_MS / max(1e-3, clock.sample(theirs, ahead=True))))
    sides = [repeated(ours, times), repeated(theirs, times)]
    ratios = []
    for turn in range(pairs + 1):
        taken = [clock.sample(side, ahead=True) for side in sides[:: -1 if turn % 2 else 1]]
        mine, its = taken[:: -1 if turn % 2 else 1]
        ratios.append(its / mine)
    return median(ratios[1:])


def fusions(place: Place, clock: Clock) -> Iterator[dict[str, Any]]:
    """Measure every kind at the benchmark's shapes, and at others."""
    jobs = []
    for dtype in DTYPES:
        known = [layer for layer in layers(place.device, place.rehearse, dtype) if layer.n != 3 * layer.k]
        for layer in [*known, *place.sized(OTHERS, [])]:
            kinds = KINDS if layer.n > layer.k or layer not in known else ["bias_grad"]
            jobs += [(kind, layer, dtype, layer in known) for kind in kinds]  # GELU follows layers that widen
    for kind, layer, dtype, known in place.all_in_time(jobs, spare=25 if not place.rehearse else 5):
        ours, theirs = pair(place, kind, layer, dtype)
        before = ops.product_uses()
        yield {
            "kind": kind,
            "where": layer.title,
            "dtype": SHORT[dtype],
            "benchmark": known,
            "speedup": speedup(clock, ours, theirs, place.sized(PAIRS, 1)),
            "refused": refused_since(before),
        }


def measured(found: list[dict[str, Any]], capability: tuple[int, int]) -> str:
    """Return the line for ``MEASURED``: the kinds that are faster at every shape of the benchmark, and not
    slower at others, with their median speedup."""
    kept = {}
    for kind in dict.fromkeys(row["kind"] for row in found):
        group = [row for row in found if row["kind"] == kind]
        least = all(row["speedup"] >= (FASTER if row["benchmark"] else NOT_SLOWER) for row in group)
        if least and not any(row["refused"] for row in group):
            kept[kind] = round(median(row["speedup"] for row in group), 2)
    values = ", ".join(f'"{kind}": {ratio}' for kind, ratio in kept.items())
    return f"    {capability}: {{{values}}},"


def rivals(place: Place, clock: Clock) -> Iterator[dict[str, Any]]:
    """Time the benchmark's rows: weight gradients, then MLPs, then others while time is left."""
    # Not here: host time and steps; compiling takes too long.
    chosen = [row for row in rows(place.device, place.rehearse) if row.calls == 1 and "step" not in row.what]
    chosen = [row for row in chosen if row.rival != COMPILED]
    chosen.sort(key=lambda row: (row.rival not in set(WEIGHT_GRAD) - {AMP}, "MLP" not in row.what))
    for row in chosen:
        if place.seconds_left < 8:
            return
        ours, theirs = row.make()
        ratio = speedup(clock, ours, theirs, place.sized(FEWER, 1))
        yield {"row": row.name, "speedup": ratio, "our_bytes": row.our_bytes, "rival_bytes": row.rival_bytes}
        del ours, theirs
        gc.collect()


def step(place: Place) -> dict[str, Any]:
    """Time GPT-2 small with micro-batches under BF16 autocast: fusedamp.nn against nn.Linear."""
    size, cuda = place.sized(GPT2, TINY), place.device == "cuda"
    draw = torch.Generator().manual_seed(1)
    shape = (size.batch, size.context + 1)
    batches = [
        torch.randint(size.vocabulary, shape, generator=draw).to(place.device) for _ in range(MICRO_BATCHES)
    ]
    clock, found = Clock(place.device), {}
    for name in ("torch AMP", "fusedamp.nn"):
        torch.manual_seed(0)
        model: Any = Model(size).to(place.device)
        if name == "fusedamp.nn":
            fusedamp.nn.convert(model)
        optimizer = torch.optim.AdamW(model.parameters(), **OPTIONS, fused=True)
        losses: list[Tensor] = []

        def whole(
            model: nn.Module = model, optimizer: Any = optimizer, losses: list[Tensor] = losses
        ) -> None:
            optimizer.zero_grad()
            for tokens in batches:
                with torch.autocast(place.device, torch.bfloat16):
                    logits = model(tokens[:, :-1])
                    loss = functional.cross_entropy(logits.float().flatten(0, 1), tokens[:, 1:].flatten())
                (loss / MICRO_BATCHES).backward()
            optimizer.step()
            losses.append(loss.detach())

        whole()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        times = [clock.sample(whole) for _ in range(place.sized(6, 2))]
        peak = torch.cuda.max_memory_allocated() / 1e9 if cuda else None
        found[name] = {"step_ms": median(times), "peak_gb": peak, "losses": [float(loss) for loss in losses]}
        del model, optimizer, whole
        gc.collect()
    mine, its = found["fusedamp.nn"], found["torch AMP"]
    gap = max(abs(a - b) for a, b in zip(mine["losses"], its["losses"], strict=True))
    place.check("the losses of torch AMP", gap < 0.05, f"they differ by up to {gap:.4f}")
    return found | {"speedup": its["step_ms"] / mine["step_ms"], "loss_gap": gap}


def run(place: Place) -> None:
    clock = Clock(place.device)
    with place.attempt("plans"):
        place.note("plans", list(plans(place)))
    with place.attempt("fusions"):
        found = list(fusions(place, clock))
        place.note("fusions", found)
        capability = torch.cuda.get_device_capability() if place.device == "cuda" else (0, 0)
        place.note("measured", measured(found, capability))
    with place.attempt("a step"):
        place.note("step", step(place))
    with place.attempt("rivals"):
        for row in rivals(place, clock):
            place.note("rivals", [*place.findings.get("rivals", []), row])
    place.note("uses", ops.product_uses())
