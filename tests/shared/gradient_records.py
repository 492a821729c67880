"""Records of gradients for tests, counted by NumPy."""

import numpy as np
import torch
from fusedamp.numerics.record import Record


def histogram(values):
    """The 64 counts of one gradient, by frexp."""
    s = np.abs(np.asarray(values, dtype=np.float64).reshape(-1))
    finite, bins = np.isfinite(s), np.full(s.shape, 63)
    exponent = np.frexp(np.where(finite, s, 1.0))[1] - 1  # s = m * 2^e with 1 <= m < 2
    bins[finite] = np.clip(exponent + 42, 1, 62)[finite]
    bins[s == 0] = 0
    return np.bincount(bins, minlength=64)


def _norm(values):
    largest = np.abs(values).max(initial=0.0)
    if largest in (0.0, np.inf) or np.isnan(largest):
        return largest
    return largest * np.linalg.norm(values / largest)


def record(gradients, step=1, scale=1.0, skipped=False, names=None, updates=None, dtype=np.float16):
    """The record of a step whose stored gradients are ``gradients`` times ``scale``, rounded to ``dtype``.

    ``updates``: None, or (moved, lost, update_norm, weight_norm) of each parameter.
    """
    with np.errstate(over="ignore"):
        stored = [(np.asarray(g, dtype=np.float64) * scale).astype(dtype) for g in gradients]
    n, wide = len(stored), [s.astype(np.float64).reshape(-1) for s in stored]
    largest = [np.abs(s).max(initial=0.0) if np.isfinite(s).all() else np.inf for s in wide]
    columns = [None] * 4
    if updates is not None:
        kinds = (torch.int64, torch.int64, torch.float64, torch.float64)
        columns = [torch.tensor([u[i] for u in updates], dtype=kind) for i, kind in enumerate(kinds)]
    return Record(
        step,
        scale,
        skipped,
        tuple(names or (f"layer{i}.weight" for i in range(n))),
        torch.tensor([s.size for s in wide], dtype=torch.int64),
        torch.tensor(np.array([histogram(s) for s in wide]).reshape(n, 64), dtype=torch.int64),
        torch.tensor(largest, dtype=torch.float64),
        torch.tensor([_norm(s) / scale for s in wide], dtype=torch.float64),
        *columns,
    )


DRIFT = {
    "healthy": lambda progress: -3 - 2 * progress,
    "overflow": lambda progress: -5 + 12 * progress**2,
    "underflow": lambda progress: -6 - 8 * progress,
    "bf16": lambda progress: -14,
}


def run(kind="healthy", records=12, parameters=6, every=50, seed=0):
    """Records and trajectory of a run: "healthy", "overflow" (gradients grow to the ceiling, and every
    fourth record is skipped), "underflow" (they fall, and the scale with them), "bf16" (scale 1)."""
    random = np.random.default_rng(seed)
    found, rows, scale = [], [], 1.0 if kind == "bf16" else 2.0**10
    widths = 2.0 ** -np.sqrt(np.arange(parameters)[:, None] % 9)
    names = [f"blocks.{i // 4}.attention.projection{i % 4}.weight" for i in range(parameters)]
    for step in range(1, records * every + 1):
        progress = step / (records * every)
        center = 2.0 ** (DRIFT[kind](progress) + 0.4 * random.standard_normal())
        if kind == "underflow" and step % (records * every // 4) == 0:
            scale /= 16
        values = center * widths * np.exp(1.5 * random.standard_normal((parameters, 400)))
        values *= random.choice((-1, 0, 1), values.shape, p=(0.49, 0.02, 0.49))
        if kind == "overflow" and step % (4 * every) == 0:
            values[0, 0] = np.inf
        largest = np.abs(values).max() * scale
        skipped = bool(largest >= 65520 and kind != "bf16")
        rows.append((step, scale, skipped, np.inf if skipped else largest))
        if step % every == 0:
            updates = [(392, round(392 * (0.5 + 0.4 * progress)), 1e-3, 1.0)] * parameters
            kept = None if skipped else updates
            dtype = np.float32 if kind == "bf16" else np.float16
            found.append(record(values, step, scale, skipped, names, kept, dtype))
        if skipped:
            scale /= 2
    return found, torch.tensor(rows, dtype=torch.float64)
