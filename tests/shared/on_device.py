"""``FUSEDAMP_TEST_DEVICE=cuda pytest``: the same tests on another device, as far as they don't name one.

Tensors are made on the CPU, with the values that they have in every run, and then moved. Modules about the
host's side (builds, processes, instruction sets, its memory, the CPU's distributed backend) stay on the CPU,
as do tests that are marked ``host``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

DEVICE = os.environ.get("FUSEDAMP_TEST_DEVICE", "cpu")
HERE = torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE)  # as tensors there tell it
# How far apart norms of one tensor may be that kernels add up in different orders; on the CPU all use one.
SUMS = 0.0 if DEVICE == "cpu" else 1e-13  # relative, in FP64
HOST_ONLY = """
    test_benchmarks test_build test_capabilities test_capture_safety test_cli
    test_content_cache test_cuda_registration test_default_device test_demo test_evidence test_house
    test_integrations test_machine_code test_ops_targets test_optim_distributed test_optim_memory test_repro
    test_repro_parity test_sharding test_storage_memory
"""
FACTORIES = """
    arange empty empty_permuted empty_strided eye full linspace logspace ones rand randint randn randperm
    scalar_tensor sparse_coo_tensor tensor zeros
"""  # by name: Dynamo, which traces what is below, has no hash of these functions


class OnDevice(TorchFunctionMode):
    """Moves what factories make without a device. ``active`` is switched per module and test."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.active = torch.device(device), True

    def enter_module(self, name: str) -> None:
        self.active = name not in HOST_ONLY.split()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        moves = (
            getattr(func, "__name__", "") in FACTORIES.split()
            and kwargs.get("device") is None
            and not kwargs.get("pin_memory")
        )
        if not (self.active and moves):
            return func(*args, **kwargs)
        requires_grad = kwargs.pop("requires_grad", False)  # a moved tensor would not be a leaf
        # Memory that is not pinned has been read when a copy returns: no need to wait for the device.
        made = func(*args, **kwargs).to(self.device, non_blocking=True)
        return made.requires_grad_(requires_grad)


def fetched(tensors: Iterable[Tensor]) -> list[Tensor]:
    """``tensors`` on the CPU, in one copy: where many processes share a device, each wait for it is long."""
    tensors = [tensor.detach() for tensor in tensors]
    if all(tensor.is_cpu for tensor in tensors):
        return tensors
    flat = torch.cat([tensor.contiguous().view(-1).view(torch.uint8) for tensor in tensors]).cpu()
    parts = flat.split([tensor.numel() * tensor.element_size() for tensor in tensors])
    return [part.clone().view(t.dtype).view(t.shape) for part, t in zip(parts, tensors, strict=True)]
