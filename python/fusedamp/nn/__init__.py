"""Linear layers: 16-bit products, FP32 weight gradients.

Under autocast torch rounds the gradient of an FP32 weight to 16 bits before it adds it up. These layers take
it from the product in FP32::

    model = fusedamp.nn.convert(model)
"""

from . import functional
from .convert import convert
from .fusions import fusions
from .layers import Linear, LinearGELU
from .mlp import MLP

__all__ = ["MLP", "Linear", "LinearGELU", "convert", "functional", "fusions"]
