"""One graph contains unscaling, clipping, step and scale update. 12 to 100 replays are compared with eager
steps, with overflows: weights, masters, states, step counts, scale and trackers must be bitwise equal.

In a rehearsal a "replay" calls the captured function again.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from fusedamp import GradScaler
from torch import Tensor

from ..borrowed import COMPRESSED, cases, compressible, differing, mixed
from ..place import Place

SHAPES = [(1,), (7,), (33, 31), (257,), (16_385,), (0,), (64, 64)]
FEEDS = 8
WARM_UP = 3  # steps before a capture: they create the states and the plan
OVERFLOWS = {0, 1, 9, 17, 18, 19, 40, 77}  # which of the replayed steps


@dataclass
class Training:
    """Parameters with gradients at fixed addresses, an optimizer and a scaler."""

    params: list[torch.nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: GradScaler
    flow: str
    norms: Tensor
    feeds: list[list[Tensor]]  # gradients of the next steps, cyclic

    def tail(self) -> None:
        if self.flow == "unscale_":
            self.scaler.unscale_(self.optimizer)
        norm = self.scaler.clip_grad_norm_(self.optimizer, 1.5)
        self.norms.copy_(norm)
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def everything(self) -> list[Tensor]:
        entries = self.optimizer.state_dict()["state"].values()
        state = [v for entry in entries for _, v in sorted(entry.items()) if isinstance(v, Tensor)]
        trackers = [
            self.scaler._growth_tracker.double(),
            self.scaler._hysteresis_budget(self.norms.device).double(),
        ]
        return [*(p.detach() for p in self.params), *state, self.scaler._scale, *trackers, self.norms]


def training(
    place: Place, case: cases.Case, dtype: torch.dtype, storage: dict[str, Any], flow: str
) -> Training:
    params = cases.make_params(dtype, SHAPES)
    params = [torch.nn.Parameter(p.detach().to(place.device)) for p in params]
    for param in params:
        param.grad = torch.zeros_like(param)
    lr = torch.tensor(1e-2, device=place.device)  # a schedule changes it between replays
    options = case.options | storage | {"lr": lr}
    if "capturable" in case.ours([torch.zeros(1)], **case.options).defaults:
        options["capturable"] = True
    optimizer = case.ours(params, **options)
    scaler = GradScaler(place.device, init_scale=64.0, growth_interval=5, hysteresis=2)
    scaler.scale(torch.ones((), device=place.device))
    norms = torch.zeros((), device=place.device)
    return Training(params, optimizer, scaler, flow, norms, feeds(place.device, dtype))


@cache
def feeds(device: str, dtype: torch.dtype) -> list[list[Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [
        [torch.randn(shape, generator=draw).mul_(64).to(device, dtype) for shape in SHAPES]
        for _ in range(FEEDS)
    ]


def feed(model: Training, step: int) -> None:
    """Write new gradients in place, without a copy from the host."""
    with torch.no_grad():
        torch._foreach_copy_([param.grad for param in model.params], model.feeds[step % FEEDS])
    if step - WARM_UP in OVERFLOWS:
        model.params[step % 3].grad.view(-1)[-1] = float("inf") if step % 2 else float("nan")
    model.optimizer.param_groups[0]["lr"].fill_(1e-2 / (1 + step))


def captured(place: Place, tail: Callable[[], None]) -> Callable[[], None]:
    if place.device != "cuda":
        return tail
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        tail()
    return graph.replay


def compare(
    place: Place, case: cases.Case, dtype: torch.dtype, storage: dict[str, Any], flow: str, replays: int
) -> None:
    eager, graphed = (training(place, case, dtype, storage, flow) for _ in range(2))
    for step in range(WARM_UP):
        for model in (eager, graphed):
            feed(model, step)
            model.tail()
    versions = [p._version for p in graphed.params]
    replay = captured(place, graphed.tail)
    if place.device == "cuda":
        bumped = [p._version > v for p, v in zip(graphed.params, versions, strict=True)]
        assert all(bumped), "version counters did not change during capture"
    steps = place.sized(replays, 6)
    for step in range(WARM_UP, WARM_UP + steps):
        for model, run in ((eager, eager.tail), (graphed, replay)):
            feed(model, step)
            run()
        if step in (WARM_UP, WARM_UP + 2, WARM_UP + steps - 1):
            found = differing(eager.everything(), graphed.everything())
            assert not found, f"after step {step - WARM_UP + 1}: {'; '.join(found[:3])}"
    stepped = [entry["step"] for entry in eager.optimizer.state.values()]
    skipped = WARM_UP + steps - int(stepped[0])
    wanted = sum(o < steps for o in OVERFLOWS)
    assert skipped == wanted, f"{skipped} steps were skipped; expected {wanted}"
    report = eager.scaler.overflow_report(eager.optimizer)
    assert str(report) == str(graphed.scaler.overflow_report(graphed.optimizer)), "overflow reports differ"


def run(place: Place) -> None:
    with place.attempt("two graphs, and eager steps between their replays"):
        interleaved(place)
    main = [*cases.MAIN, *cases.COMPOSED]
    variants = [case for case in cases.CASES if case not in main]
    jobs = [
        (case, dtype, name, storage, flow)
        for case in place.sized([*main, *variants], cases.MAIN[:1])
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
        for name, storage in formats(case, dtype).items()
        for flow in ("unscale_", "fused")
    ]
    for case, dtype, name, storage, flow in place.all_in_time(mixed(jobs)):
        with place.attempt(f"{case.name} {dtype} {name} {flow}"):
            few = 25 if case in main and flow == "fused" else 12
            compare(place, case, dtype, storage, flow, 100 if case.name == "adamw" else few)
    place.note("graphs", len(jobs))
    replays = "100 of adamw, 25 of others; with unscale_, and of variants of options, 12"
    place.note("replays_each", place.sized(replays, "6"))


def formats(case: cases.Case, dtype: torch.dtype) -> dict[str, dict[str, Any]]:
    if dtype == torch.float32:
        return {"as is": {}}
    modes = {f"master_weights={mode}": {"master_weights": mode} for mode in ("auto", "none")}
    return {**modes, **(COMPRESSED if dtype == torch.bfloat16 and compressible(case) else {})}


def interleaved(place: Place) -> None:
    """Check that each graph has its own tables and memory: memory freed by eager calls is reused."""
    case = cases.BY_NAME["adamw"]
    pairs = []
    for flow in ("unscale_", "fused"):
        eager, graphed = (training(place, case, torch.bfloat16, {}, flow) for _ in range(2))
        for step in range(WARM_UP):
            for model in (eager, graphed):
                feed(model, step)
                model.tail()
        pairs.append((eager, graphed, captured(place, graphed.tail)))
    for step in range(WARM_UP, WARM_UP + 20):
        for eager, graphed, replay in pairs:
            feed(graphed, step)
            replay()
            feed(eager, step)
            eager.tail()
        torch.full((100_000,), float("nan"), device=place.device)  # overwrites freed memory
    for eager, graphed, _ in pairs:
        found = differing(eager.everything(), graphed.everything())
        assert not found, "; ".join(found[:3])
