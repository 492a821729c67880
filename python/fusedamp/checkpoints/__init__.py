"""Checkpoints between libraries: optimizer states of others, and FP32 weights out of 16-bit training."""

from .conversion import convert
from .fp32_weights import fp32_state_dict

__all__ = ["convert", "fp32_state_dict"]
