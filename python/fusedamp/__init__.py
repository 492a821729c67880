"""Mixed-precision training for PyTorch: loss scaling, overflow checks and optimizer steps on FP32 master
weights, fused."""

from . import ops
from ._C import build_info as _build_info
from .capabilities import Capability, capabilities
from .clip import clip_grad_norm_
from .estimate import Estimate, Memory, estimate
from .grad_scaler import GradScaler
from .overflow import Overflow, OverflowReport
from .patch import patch_torch

__version__: str = _build_info()["version"]  # metadata is only where pip installed
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
