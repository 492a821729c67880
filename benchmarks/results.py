"""One measured row, and the CSV of all."""

from __future__ import annotations

import csv
from dataclasses import dataclass
from pathlib import Path

from .duel import Agreement
from .machine import Machine
from .rows import Row
from .timing import Timing, percentile
from .workloads import Shapes, numel


@dataclass(frozen=True)
class Result:
    row: Row
    shapes: Shapes
    timing: Timing
    checked: Agreement
    stream_bytes: int | None  # of one stream sample; None without a stream

    def ratio(self, percent: float = 50) -> float:
        """Return the speedup: their time / our time."""
        return percentile(self.timing.ratios(), percent)

    @property
    def share_of_stream(self) -> float:
        """Return the bandwidth of our full step, counting only the floor's bytes, over that of the paired
        stream."""
        if self.stream_bytes is None:
            return float("nan")
        floor = self.row.floor_bytes * numel(self.shapes)
        return percentile(self.timing.roof_ratios(), 50) * floor / self.stream_bytes

    @property
    def stream_gb_s(self) -> float:
        if self.stream_bytes is None:
            return float("nan")
        return self.stream_bytes / percentile(self.timing.seconds("stream"), 50) / 1e9

    @property
    def verdict(self) -> str:
        """Return faster or slower if at least four of five pairs agree."""
        if not self.timing.clean:
            return "not measured"
        if self.ratio(20) > 1:
            return "faster"
        return "slower" if self.ratio(80) < 1 else "even"

    def record(self, machine: Machine, quick: bool) -> dict[str, object]:
        """Return the CSV line. Milliseconds are informative; only ratios are comparable."""
        row, timing = self.row, self.timing
        times = {
            f"{who}_ms_{name}": percentile(timing.seconds(who), percent) * 1e3
            for who in ("ours", "theirs")
            for name, percent in (("best", 0), ("p20", 20), ("p50", 50), ("p80", 80))
        }
        return {
            "optimizer": row.optimizer,
            "workload": row.workload,
            "quick": int(quick),
            "tensors": len(self.shapes),
            "numel": numel(self.shapes),
            "dtype": row.dtype,
            "rival": row.rival.key,
            "rival_title": row.rival.title,
            "threads": timing.threads,
            "clock": timing.clock,
            "ratio_p20": self.ratio(20),
            "ratio_p50": self.ratio(),
            "ratio_p80": self.ratio(80),
            "ratio_of_best": times["theirs_ms_best"] / times["ours_ms_best"],
            "verdict": self.verdict,
            **times,
            "floor_bytes": row.floor_bytes,
            "our_bytes": row.our_bytes,
            "rival_bytes": row.rival_bytes,
            "stream_gb_s": self.stream_gb_s,
            "share_of_stream": self.share_of_stream,
            "clean": len(timing.clean),
            "dropped": timing.dropped,
            "other_load": timing.other_load,
            "weight_difference": self.checked.difference,
            "tolerance": self.checked.tolerance,
            **vars(machine),
        }


def write_csv(path: Path, records: list[dict[str, object]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(records[0]), lineterminator="\n")
        writer.writeheader()
        for record in records:
            writer.writerow({key: _text(value) for key, value in record.items()})


def _text(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value
