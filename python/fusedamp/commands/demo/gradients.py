"""Measures what rounding does to weight gradients of linear layers: torch's AMP against fusedamp.nn."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from fusedamp.commands.demo.models import Linear
from fusedamp.commands.demo.options import DTYPES
from fusedamp.commands.demo.tasks import Batch
from fusedamp.commands.demo.train import Run
from fusedamp.nn import convert


def gradients_line(runs: list[Run], batch: Batch) -> str:
    """Return a line on the errors under AMP and after `convert`; empty without 16-bit runs."""
    amp = [run for run in runs if run.variant.stack == "torch" and run.variant.dtype != "fp32"]
    if not amp:
        return ""
    rounded = [f"{weight_gradient_error(run, batch):.1e} in {run.variant.dtype.upper()}" for run in amp]
    ours = max(weight_gradient_error(run, batch, converted=True) for run in amp)
    return (
        f"Weight gradients of linear layers have relative errors of up to {' and '.join(rounded)} under "
        f"torch's AMP, which rounds them to 16 bits, and of {ours:.1e} after fusedamp.nn.convert."
    )


def weight_gradient_error(run: Run, batch: Batch, converted: bool = False) -> float:
    """Return the largest |gradient - exact| / |exact| over the linear layers of an AMP run's model.

    Exact is the FP64 sum of the products of the same 16-bit values; the norms are those of whole gradients.
    """
    run, dtype = copy.copy(run), DTYPES[run.variant.dtype]
    run.model = copy.deepcopy(run.model)
    layers: list[Any] = [module for module in run.model.modules() if type(module) is Linear]
    exact: dict[nn.Module, Tensor] = {}

    def record(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x = inputs[0].detach().to(dtype).double().flatten(0, -2)

        def sum_products(grad: Tensor) -> None:
            exact[layer] = grad.double().flatten(0, -2).t() @ x

        output.register_hook(sum_products)  # type: ignore[no-untyped-call]

    for layer in layers:
        layer.weight.grad = None
        layer.register_forward_hook(record)
        if converted:
            layer.__class__ = nn.Linear
    if converted:
        convert(run.model)
    loss, _ = run.loss(batch)
    run.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
    return max(float((layer.weight.grad - exact[layer]).norm() / exact[layer].norm()) for layer in layers)
