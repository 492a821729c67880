"""Mixed-precision training for PyTorch: loss scaling, overflow checks and optimizer steps on FP32 master
weights, fused."""

try:
    from ._C import build_info as _build_info
except ModuleNotFoundError as error:
    raise ImportError(
        "fusedamp is not built for this Python: its compiled module _C is missing. Run `pip install .` (or "
        "`pip install -e .`) in its source folder; in a checkout, don't import it from python/ before that."
    ) from error

from . import checkpoints, cpu, cuda, energy, nn, numerics, ops, optim
from .amp.clip import clip_grad_norm_
from .amp.grad_scaler import GradScaler
from .amp.overflow import Overflow, OverflowReport
from .amp.patch import patch_torch
from .capabilities import Capability, capabilities
from .memory.estimate import Estimate, Memory, estimate
from .memory.pack import PackedParameters, pack_parameters

__version__: str = _build_info()["version"]  # package metadata exists only after installation with pip
__all__ = [
    "Capability",
    "Estimate",
    "GradScaler",
    "Memory",
    "Overflow",
    "OverflowReport",
    "PackedParameters",
    "__version__",
    "capabilities",
    "checkpoints",
    "clip_grad_norm_",
    "cpu",
    "cuda",
    "energy",
    "estimate",
    "nn",
    "numerics",
    "ops",
    "optim",
    "pack_parameters",
    "patch_torch",
]
