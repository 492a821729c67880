"""Which parts of a linear layer run inside its products, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops import linear

KINDS = {
    "bias_grad": "the bias gradient, in the product of the weight gradient",
    "gelu": "tanh-GELU, in the product before it",
    "gelu_grad": "the gradient of GELU, in the product of the input gradient",
}

# The median speedup of each kind over all shapes of benchmarks/evidence, by compute capability. A kind is the
# default where its slowest shape reached 0.99 and all reached 1.02 in the median of pairs; the default
# elsewhere is unfused.
MEASURED: dict[tuple[int, int], dict[str, float]] = {}

_chosen: dict[str, bool] = {}


def is_fused(kind: str, tensor: Tensor) -> bool:
    """True if ``kind`` runs inside products on the device of ``tensor``."""
    if _chosen or tensor.is_cuda:
        return _is_fused_on(kind, tensor.device)
    return kind == "bias_grad"  # on the CPU it shares the upcast gradient


def _is_fused_on(kind: str, device: torch.device) -> bool:
    if kind in _chosen:
        return _chosen[kind]
    if device.type != "cuda" or not MEASURED:
        return device.type == "cpu" and kind == "bias_grad"
    return kind in MEASURED.get(torch.cuda.get_device_capability(device), {})


class Fusion(NamedTuple):
    """One row of :func:`fusions`."""

    kind: str
    fused: bool
    why: str


class Fusions(tuple[Fusion, ...]):
    """What :func:`fusions` returns: rows that print as a table, and a context manager."""

    _before: dict[str, bool]

    def __enter__(self) -> Fusions:
        return self

    def __exit__(self, *_: Any) -> None:
        _chosen.clear()
        _chosen.update(self._before)

    def __str__(self) -> str:
        width = max(len(row.kind) for row in self)
        return "\n".join(f"{row.kind:{width}}  {'fused' if row.fused else '-':5}  {row.why}" for row in self)

    __repr__ = __str__


def fusions(
    device: torch.device | str | None = None,
    *,
    bias_grad: bool | None = None,
    gelu: bool | None = None,
    gelu_grad: bool | None = None,
) -> Fusions:
    """Report what runs inside the products of linear layers on a device, and why; or choose it.

    A fusion is the default on a compute capability where it was measured to be faster at every shape; nowhere
    else. FP32 weight gradients, and adding them to ``.grad`` inside the product, are always on: they are the
    result.

    Args:
        device: the current CUDA device by default, or the CPU if there is none.
        bias_grad, gelu, gelu_grad: True or False chooses for the process, from the next forward pass on; in a
            ``with`` statement until its end. None keeps the choice.
    Returns: rows of (kind, fused, why). On CUDA more rows name what cuBLASLt refused, and how often.
    Raises: TypeError, ValueError naming the argument.
    Cost: none for the layers.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    device = _device(device)
    before = dict(_chosen)
    choice = {"bias_grad": bias_grad, "gelu": gelu, "gelu_grad": gelu_grad}
    for kind, value in choice.items():
        if value is not None and not isinstance(value, bool):
            raise TypeError(f"[fusions] {kind} is {value!r}; expected True, False or None")
    _chosen.update({kind: value for kind, value in choice.items() if value is not None})
    rows = [Fusion(kind, _is_fused_on(kind, device), _why(kind, device)) for kind in KINDS]
    rows += [
        Fusion(use.epilogue, False, f"{use.inputs} to {use.output}, {use.calls} calls refused: {use.refused}")
        for use in linear.product_uses()
        if use.refused and use.device == (device.index or 0)
    ]
    report = Fusions(rows)
    report._before = before
    return report


def _device(device: Any) -> torch.device:
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(
            f'[fusions] device is {device!r}; expected a device. Pass "cpu" or "cuda".'
        ) from None
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f'[fusions] device is {found}, and torch finds no GPU. Pass "cpu".')
    return found


def _why(kind: str, device: torch.device) -> str:
    what = KINDS[kind]
    if kind in _chosen:
        return f"{what}: chosen"
    if device.type == "cpu":
        return f"{what}: shares its operand" if kind == "bias_grad" else f"{what}: torch has no such product"
    if device.type != "cuda":
        return f"{what}: no kernels for {device.type}"
    capability = torch.cuda.get_device_capability(device)
    name = f"compute capability {capability[0]}.{capability[1]}"
    if capability not in MEASURED:
        return f"{what}: not measured on {name}"
    ratio = MEASURED[capability].get(kind)
    return f"{what}: {'not faster' if ratio is None else f'{ratio:.2f} times as fast'} on {name}"
