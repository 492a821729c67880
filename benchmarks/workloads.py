"""The timed parameter lists: name, description, shapes at full size and for ``--quick``."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import prod

Shapes = list[tuple[int, ...]]


@dataclass(frozen=True)
class Workload:
    name: str
    story: str
    full: Shapes
    quick: Shapes

    def shapes(self, quick: bool) -> Shapes:
        return self.quick if quick else self.full


def numel(shapes: Shapes) -> int:
    return sum(prod(shape) for shape in shapes)


def gpt2(vocabulary: int, context: int, width: int, layers: int) -> Shapes:
    """List the parameters of GPT-2 in order (Radford et al. 2019): 4 + 12 per layer."""
    norm: Shapes = [(width,), (width,)]
    attention: Shapes = [(width, 3 * width), (3 * width,), (width, width), (width,)]
    feed_forward: Shapes = [(width, 4 * width), (4 * width,), (4 * width, width), (width,)]
    return [(vocabulary, width), (context, width), *(norm + attention + norm + feed_forward) * layers, *norm]


def many_small(count: int) -> Shapes:
    """List ``count`` vectors of 1,000 to 10,000 elements, the same in each run."""
    draw = random.Random(0)
    return [(draw.randint(1_000, 10_000),) for _ in range(count)]


WORKLOADS = {
    workload.name: workload
    for workload in (
        Workload("W1", "one flat tensor", [(40_000_000,)], [(2_000_000,)]),
        Workload("W2", "GPT-2 small", gpt2(50_257, 1_024, 768, 12), gpt2(4_000, 256, 128, 6)),
        Workload("W3", "2,000 small tensors", many_small(2_000), many_small(200)),
        Workload("host", "2,000 tensors of 10 elements", [(10,)] * 2_000, [(10,)] * 400),
    )
}
