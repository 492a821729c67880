"""Mixed-precision training for PyTorch: loss scaling, overflow checks and optimizer steps on FP32 master
weights, fused."""

from importlib.metadata import version as _version

from . import ops
from .capabilities import Capability, capabilities
from .clip import clip_grad_norm_
from .estimate import Estimate, Memory, estimate
from .grad_scaler import GradScaler
from .overflow import Overflow, OverflowReport
from .patch import patch_torch

__version__ = _version("fusedamp")
__all__ = [
    "Capability",
    "Estimate",
    "GradScaler",
    "Memory",
    "Overflow",
    "OverflowReport",
    "__version__",
    "capabilities",
    "clip_grad_norm_",
    "estimate",
    "ops",
    "patch_torch",
]
