"""The ops, typed and documented: `torch.ops.fusedamp.*` with argument names, checks that raise ValueError or
TypeError, and version counters that autograd can trust.

Every tensor of a call lives on one device. Lists mix float16, bfloat16, float32 and float64 freely. Tensors
are dense in memory (no gaps or overlaps) in any order of dimensions; what belongs to a parameter has its
shape and strides. Empty and 0-dim tensors and views at any offset are fine, and so is an empty list: there
is nothing to do then. Nothing synchronizes with the host, and a call that raises has changed nothing.

Every step op also takes ``maximize`` (ascend instead of descend), ``inv_scale``, ``clip_coef`` and
``found_inf``.
"""

from .families import (
    adagrad_,
    adam_,
    adamw_,
    lamb_,
    lars_,
    lion_,
    nadam_,
    novograd_,
    radam_,
    rmsprop_,
    rmsprop_centered_,
    sgd_,
)
from .gradients import GradCheck as GradCheck  # for fusedamp.amp
from .gradients import GradStats, grad_stats, unscale_
from .gradients import Numerics as Numerics
from .gradients import _grad_stats as _grad_stats
from .gradients import check_grads as check_grads
from .gradients import squares as squares
from .linear import linear_gelu, linear_gelu_input_grad, linear_weight_grad, linear_weight_grad_
from .loss_scale import HEADROOM_STATE as HEADROOM_STATE
from .loss_scale import update_scale_, update_scale_headroom_
from .numerics import grad_numerics
from .step import StepCall as StepCall  # for fusedamp.optim
from .step import check_memory as check_memory
from .step import check_steps as check_steps
from .step import measure as measure
from .step import options_of as options_of
from .step import step_lists as step_lists
from .step import step_scalars as step_scalars

__all__ = [
    "GradStats",
    "adagrad_",
    "adam_",
    "adamw_",
    "grad_numerics",
    "grad_stats",
    "lamb_",
    "lars_",
    "linear_gelu",
    "linear_gelu_input_grad",
    "linear_weight_grad",
    "linear_weight_grad_",
    "lion_",
    "nadam_",
    "novograd_",
    "radam_",
    "rmsprop_",
    "rmsprop_centered_",
    "sgd_",
    "unscale_",
    "update_scale_",
    "update_scale_headroom_",
]
