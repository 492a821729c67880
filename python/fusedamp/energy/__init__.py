"""Energy of GPUs and CPUs by their own counters: joules of a block, and of variants of a step against each
other.

The counters are NVML's of NVIDIA GPUs (Volta and later) and RAPL's of CPU packages. Energy is never derived
from power readings, nothing is subtracted from it, and what cannot be measured raises `EnergyError`.
"""

from .comparison import Arm, Comparison, Ratio, compare
from .counter import EnergyError
from .windows import Window, window

__all__ = ["Arm", "Comparison", "EnergyError", "Ratio", "Window", "compare", "window"]
