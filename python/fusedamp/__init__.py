"""Mixed-precision training for PyTorch: loss scaling, overflow checks and optimizer steps on FP32 master weights, fused."""

from importlib.metadata import version as _version

from . import ops

__version__ = _version("fusedamp")
__all__ = ["__version__", "ops"]
