"""Replays policies of the loss scale on recorded maxima of gradients: skipped steps, and unused range.

python benchmarks/scale_policies.py [--record]

writes results/scale-policies.csv and .md, the same on every machine. `--record` first trains the demo's two
networks and writes results/scale-policies-traces.csv: the largest |gradient| of the weights, and of the
activations (`grad_output` of all leaf modules), in each step.
"""

from __future__ import annotations

import argparse
import csv
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random
from statistics import NormalDist, fmean
from typing import NamedTuple

import torch
import torch.nn.functional as F
from fusedamp import ops
from torch import Tensor, nn

RESULTS = Path(__file__).resolve().parent / "results"
TRACES = RESULTS / "scale-policies-traces.csv"
TABLE = RESULTS / "scale-policies.csv"
OVERFLOW = 65520.0  # the smallest number that rounds to infinity in FP16
RECORDED = {"GPT": 700, "digits": 1500}  # steps
STEPS = 20_000
NORMAL = NormalDist()


class Step(NamedTuple):
    """The largest |gradient| of a step, unscaled."""

    weights: float
    activations: float

    def times(self, factor: float) -> Step:
        return Step(self.weights * factor, self.activations * factor)

    @property
    def largest(self) -> float:
        return max(self)

    @property
    def best(self) -> int:
        """Return the exponent of the largest power of two that does not overflow."""
        exponent = math.frexp(OVERFLOW / self.largest)[1]
        while self.largest * 2.0**exponent >= OVERFLOW:
            exponent -= 1
        return exponent


Trace = list[Step]


# Recording -----------------------------------------------------------------------------------------------


def record(name: str, steps: int) -> Iterator[Step]:
    """Train one of the demo's networks in FP32 without a scale, as the demo pre-trains it."""
    from fusedamp.commands.demo.tasks import digits_task, gpt_task
    from fusedamp.commands.demo.train import MAX_NORM

    task = gpt_task(None) if name == "GPT" else digits_task()
    torch.manual_seed(0)
    model = task.make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=task.pretrain_lr)
    seen: list[Tensor] = []

    def look(module: nn.Module, inputs: object, output: Tensor) -> None:
        output.register_hook(lambda grad: seen.append(grad.abs().max()))  # type: ignore[no-untyped-call]

    for module in model.modules():
        if not list(module.children()):
            module.register_forward_hook(look)
    for step in range(steps):
        x, y = task.pretrain(0, step)
        optimizer.zero_grad()
        seen.clear()
        F.cross_entropy(model(x).flatten(0, -2), y.flatten()).backward()  # type: ignore[no-untyped-call]
        weights = max(p.grad.abs().max().item() for p in model.parameters() if p.grad is not None)
        yield Step(weights, torch.stack(seen).max().item())
        nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()


def write_traces() -> None:
    with TRACES.open("w", newline="") as file:
        out = csv.writer(file, lineterminator="\n")
        out.writerow(("network", *Step._fields))
        for name, steps in RECORDED.items():
            for step in record(name, steps):
                out.writerow((name, *(f"{x:.9g}" for x in step)))


def read_traces() -> dict[str, Trace]:
    traces: dict[str, Trace] = {name: [] for name in RECORDED}
    with TRACES.open(newline="") as file:
        for row in csv.DictReader(file):
            traces[row["network"]].append(Step(float(row["weights"]), float(row["activations"])))
    return traces


# Scenarios: a trace, and how many bits are added to it in each step -----------------------------------------

Shift = Callable[[int, Random], float]


def normal(random: Random) -> float:
    return NORMAL.inv_cdf(1.0 - random.random())


def t2(random: Random) -> float:
    """Draw from Student's t distribution with 2 degrees of freedom, by its inverse."""
    u = 1.0 - random.random()
    return (2 * u - 1) / math.sqrt(2 * u * (1 - u)) if u < 1 else 0.0


def walk(pace: float) -> Shift:
    place = 0.0

    def shift(step: int, random: Random) -> float:
        nonlocal place
        place += pace * normal(random)
        return place

    return shift


def drift(bits: float) -> Shift:
    return lambda step, random: bits * step / STEPS


SCENARIOS: dict[str, tuple[Callable[[], Shift], float]] = {  # and the bits added to the activations
    "stationary": (lambda: drift(0), 0),
    "drift -12 bits": (lambda: drift(-12), 0),
    "drift +12 bits": (lambda: drift(12), 0),
    "+6 bits every 500 steps": (lambda: lambda step, random: 6.0 * (step % 500 == 499), 0),
    "+4 bits in 2 % of steps": (lambda: lambda step, random: 4.0 * (random.random() < 0.02), 0),
    "+10 bits for 50 steps": (lambda: lambda step, random: 10.0 * (0 <= step - STEPS // 2 < 50), 0),
    "step of +10 bits": (lambda: lambda step, random: 10.0 * (step >= STEPS // 2), 0),
    "step of -10 bits": (lambda: lambda step, random: -10.0 * (step >= STEPS // 2), 0),
    "random walk, 0.05 bits a step": (lambda: walk(0.05), 0),
    "heavy tails: 0.7 bits times t(2)": (lambda: lambda step, random: 0.7 * t2(random), 0),
    "activations 5 bits larger": (lambda: drift(0), 5),
    "the same, drift -12 bits": (lambda: drift(-12), 5),
}
AS_RECORDED = "as recorded"


def scenario(name: str, trace: Trace) -> Trace:
    """Return the steps of a scenario: the trace, or draws from its second half, shifted."""
    if name == AS_RECORDED:
        return trace
    make, more = SCENARIOS[name]
    random, shift, steady = Random(name), make(), trace[len(trace) // 2 :]
    steps = []
    for i in range(STEPS):
        drawn = steady[int(random.random() * len(steady))].times(2.0 ** shift(i, random))
        steps.append(Step(drawn.weights, drawn.activations * 2.0**more))
    return steps


# Policies --------------------------------------------------------------------------------------------------


class Policy(ABC):
    scale: float

    @abstractmethod
    def update(self, overflow: bool, largest: float) -> None:
        """Move the scale; ``largest`` is the largest |gradient| of the weights, unscaled."""


class Growth(Policy):
    """The scale by growth and backoff, of torch's scaler and others."""

    def __init__(self, scale: float, interval: int, hysteresis: int = 1, floor: float = 0.0) -> None:
        self.scale = scale
        self._scale, self._flag = torch.tensor(scale), torch.zeros(())
        self._good, self._budget = torch.tensor([0, hysteresis], dtype=torch.int32).unbind()
        self._rule = dict(growth_interval=interval, hysteresis=hysteresis, min_scale=floor)

    def update(self, overflow: bool, largest: float) -> None:
        self._flag.fill_(overflow)
        ops.update_scale_(
            self._scale,
            self._good,
            self._flag,
            growth_factor=2.0,
            backoff_factor=0.5,
            hysteresis_tracker=self._budget,
            **self._rule,  # type: ignore[arg-type]
        )
        self.scale = self._scale.item()


class Headroom(Policy):
    """fusedamp's, from torch's first scale."""

    def __init__(self) -> None:
        self.scale = 2.0**16
        self._scale, self._flag = torch.tensor(self.scale), torch.zeros(())
        self._largest = torch.zeros((), dtype=torch.float64)
        self._state = torch.zeros(ops.HEADROOM_STATE, dtype=torch.int32)

    def update(self, overflow: bool, largest: float) -> None:
        self._flag.fill_(overflow)
        self._largest.fill_(math.inf if overflow else largest * self.scale)
        ops.update_scale_headroom_(self._scale, self._state, self._flag, self._largest)
        self.scale = self._scale.item()


class LogMax(Policy):
    """The scale from mean and deviation of the maxima's logarithms: OpenSeq2Seq's "LogMax".

    It takes 16 for the logarithm of a maximum that overflowed; the original takes 2^16, which brings the
    scale to 1 for hundreds of steps.
    """

    def __init__(self) -> None:
        self.scale, self._steps = 2.0**14, 0
        self._mean, self._slow, self._square = 0.0, 0.0, 0.0

    def update(self, overflow: bool, largest: float) -> None:
        x = 16.0 if overflow else math.log2(largest)
        self._steps += 1
        self._mean += 0.01 * (x - self._mean)
        self._slow += 0.001 * (x - self._slow)
        self._square += 0.001 * (x * x - self._square)
        mean = self._mean / (1 - 0.99**self._steps)
        slow, square = (sum_ / (1 - 0.999**self._steps) for sum_ in (self._slow, self._square))
        deviation = math.sqrt(max(square - slow * slow, 0.0))
        self.scale = min(max(2.0 ** (16 - mean - 3.09 * deviation), 1.0), 2.0**24)


POLICIES: dict[str, Callable[[], Policy]] = {
    "torch": lambda: Growth(2.0**16, 2000),
    "Megatron": lambda: Growth(2.0**32, 1000, hysteresis=2, floor=1.0),
    "LogMax": LogMax,
    "headroom": Headroom,
}


class Outcome(NamedTuple):
    skips: int
    bits: float  # below the best power of two, mean over the steps that were not skipped


def replay(policy: Policy, steps: Trace) -> Outcome:
    """Run a policy; the batch of a skipped step is lost."""
    skips, bits = 0, []
    for step in steps:
        overflow = step.largest * policy.scale >= OVERFLOW
        skips += overflow
        if not overflow:
            bits.append(step.best - math.log2(policy.scale))
        policy.update(overflow, step.weights)
    return Outcome(skips, fmean(bits) if bits else 0.0)


def records(names: tuple[str, ...] = (AS_RECORDED, *SCENARIOS)) -> Iterator[dict[str, str]]:
    traces = read_traces()
    for network, trace in traces.items():
        for name in names:
            steps = scenario(name, trace)
            for policy, make in POLICIES.items():
                skips, bits = replay(make(), steps)
                yield dict(
                    network=network,
                    scenario=name,
                    steps=str(len(steps)),
                    policy=policy,
                    skips=str(skips),
                    bits=f"{bits:.2f}",
                )


def lead(trace: Trace) -> list[float]:
    """Return by how many bits weight gradients were above activation gradients."""
    return sorted(math.log2(step.weights / step.activations) for step in trace)


def report(rows: list[dict[str, str]]) -> str:
    lines = [
        "# Policies of the loss scale, replayed",
        "",
        "Skipped steps / bits below the best power of two (mean over the other steps). A step is skipped if "
        "the largest gradient of weights or activations, times the scale, is 65,520 or more; its batch is "
        "lost. The policies see the gradients of the weights only.",
        "",
        "The maxima were recorded in FP32, in training the demo's two networks. "
        f"Scenarios other than the first: {STEPS:,} steps drawn from the second half of a record, and "
        "shifted.",
        "",
        "Policies: torch's scaler (2^16, 2,000 steps); Megatron's (2^32, 1,000 steps, hysteresis 2); LogMax "
        "(from 2^14; EMA 0.99 and 0.999, 3.09 deviations, 1 to 2^24); headroom (from 2^16; 2 bits).",
        "",
    ]
    for network, trace in read_traces().items():
        bits = lead(trace)
        lines += [
            f"## {network}, {len(trace):,} steps recorded",
            "",
            f"Weight gradients are {bits[len(bits) // 2]:.1f} bits above activation gradients in the median, "
            f"and {bits[0]:.1f} at least.",
            "",
            f"| scenario | {' | '.join(POLICIES)} |",
            "|---|" + "---:|" * len(POLICIES),
        ]
        for name in (AS_RECORDED, *SCENARIOS):
            cells = [
                f"{row['skips']} / {float(row['bits']):.1f}"
                for row in rows
                if (row["network"], row["scenario"]) == (network, name)
            ]
            lines.append(f"| {name} | {' | '.join(cells)} |")
        lines.append("")
    lines += ["## Both", ""]
    for policy in POLICIES:
        chosen = [row for row in rows if row["policy"] == policy]
        skips, bits_ = sum(int(row["skips"]) for row in chosen), fmean(float(row["bits"]) for row in chosen)
        lines.append(f"- {policy}: {skips} skips in {len(chosen)} rows, {bits_:.1f} bits on average")
    lines += ["", "Rows in which headroom skipped more than torch:", ""]
    lines += [f"- {network}, {name}: {ours} and {theirs}" for network, name, ours, theirs in losses(rows)]
    return "\n".join(lines) + "\n"


def losses(rows: list[dict[str, str]]) -> list[tuple[str, str, int, int]]:
    """Return where the headroom policy skipped more steps than torch's: its skips, and torch's."""
    skips = {(row["network"], row["scenario"], row["policy"]): int(row["skips"]) for row in rows}
    pairs = [
        (network, name, ours, skips[network, name, "torch"])
        for (network, name, policy), ours in skips.items()
        if policy == "headroom"
    ]
    return [pair for pair in pairs if pair[2] > pair[3]]


def read_table() -> list[dict[str, str]]:
    with TABLE.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--record", action="store_true", help="train the networks again (1 minute)")
    if parser.parse_args().record:
        write_traces()
    rows = list(records())
    with TABLE.open("w", newline="") as file:
        out = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        out.writeheader()
        out.writerows(rows)
    TABLE.with_suffix(".md").write_text(text := report(rows))
    print(text)


if __name__ == "__main__":
    main()
