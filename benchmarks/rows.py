"""The comparisons: one row per pair, with the bytes per parameter that each side moves.

A byte count is arithmetic over passes, r(ead) and w(ritten), for FP32 states:

    update, FP32          AdamW  r p g m v, w p m v = 28     SGD with momentum  r p g b, w p b = 20
    update, 16 + master   the same: 2 + 2 bytes of weight and gradient take the place of 4
    torch's unscale_ 8 (r w g), norm 4 (r g), clip 8 (r w g)
    masters by hand: gradients in 6 (r 2, w 4), weights out 6 (r 4, w 2)
    foreach and for-loop: each operation is a pass. AdamW: decay 8 (Adam: 12), lerp 12, v 8 + 12,
        sqrt / + 24, addcdiv 16. SGD: decay 12, b 8 + 12, p 12
    ours: one gradient check (4 or 2), the update, and 2 to detect a modified 16-bit weight
    floor: minimum of any implementation: a read for the overflow check and the norm, then the update
"""

from __future__ import annotations

from dataclasses import dataclass

UPDATE = {"adamw": 28, "adam": 28, "sgd": 20}
ELEMENTARY = {"adamw": 80, "adam": 84, "sgd": 44}  # the update as single operations
UNSCALE_NORM_CLIP = 8 + 4 + 8
COPIES = 6 + 6


@dataclass(frozen=True)
class Rival:
    key: str
    title: str
    dtype: str
    implementation: str  # of torch's optimizer: fused, foreach, loop or compiled
    by_hand: bool = False  # FP32 masters, copied in and out

    def bytes_per_param(self, optimizer: str) -> int:
        one_pass = self.implementation in ("fused", "compiled")
        update = (UPDATE if one_pass else ELEMENTARY)[optimizer]
        return UNSCALE_NORM_CLIP + update + (COPIES if self.by_hand else 0)


RIVALS = {
    rival.key: rival
    for rival in (
        Rival("P1", "torch fused", "fp32", "fused"),
        Rival("P2", "torch foreach", "fp32", "foreach"),
        Rival("P3", "masters by hand", "bf16", "fused", by_hand=True),
        Rival("P4", "masters by hand", "fp16", "fused", by_hand=True),
        Rival("P5", "torch for-loop", "fp32", "loop"),
        # Compiling takes 5 s for W1, a minute for the 148 tensors of W2, and longer than this suite for W3.
        Rival("P6", "torch compiled", "fp32", "compiled"),
    )
}


@dataclass(frozen=True)
class Row:
    optimizer: str
    workload: str
    rival: Rival

    @property
    def dtype(self) -> str:
        return self.rival.dtype

    @property
    def name(self) -> str:
        return f"{self.optimizer} {self.workload} {self.dtype} against {self.rival.key}"

    @property
    def floor_bytes(self) -> int:
        return UPDATE[self.optimizer] + (4 if self.dtype == "fp32" else 2)

    @property
    def our_bytes(self) -> int:
        return self.floor_bytes + (0 if self.dtype == "fp32" else 2)

    @property
    def rival_bytes(self) -> int:
        return self.rival.bytes_per_param(self.optimizer)


def _rows(optimizer: str, workloads: str, rivals: str) -> list[Row]:
    return [Row(optimizer, w, RIVALS[r]) for w in workloads.split() for r in rivals.split()]


ROWS = [
    *_rows("adamw", "W1 W2 W3", "P1 P2 P3 P4 P5"),
    *_rows("adamw", "W1", "P6"),
    *_rows("adam", "W1 W3", "P1 P3"),
    *_rows("sgd", "W1 W3", "P1 P2 P3"),
    *_rows("adamw", "host", "P1 P2 P3"),
]
