"""One optimizer step on a large BF16 tensor and on many small ones, to run under a profiler."""

from __future__ import annotations

import torch

from ..place import Place
from ..sides import ours


def run(place: Place) -> None:
    flat, many = place.sized(((200_000_000,), 2_000), ((5_000,), 20))
    for shapes in ([flat], [(5_000,)] * many):
        side = ours(shapes, torch.bfloat16, place.device)
        side.phase()
        place.check("the weights are finite", all(bool(w.isfinite().all()) for w in side.weights))
