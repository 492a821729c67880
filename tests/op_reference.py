"""The update rules in float64, typed from the papers, each result with a bound on the op's rounding error.

The bounds count roundings, to first order, in multiples of the unit roundoff u (2^-24; 2^-53 for float64
weights): one for each operation and one for each coefficient that is rounded. Where terms may cancel, they
are relative to the sum of magnitudes. SLACK covers the second order; float64 references commit as many
roundings as the op, hence twice the bound.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

SLACK = 1.01


@dataclass
class Bounded:
    """A value that the op may miss by at most `error`."""

    value: Tensor
    error: Tensor

    def check(self, got: Tensor, what: str, u: float) -> None:
        miss = (got.double() - self.value).abs()
        allowed = self.error * (2 * SLACK if u < 2**-50 else SLACK)
        worst = (miss - allowed).max().item() if miss.numel() else 0.0
        assert worst <= 0, (
            f"{what} misses the reference by {miss.max().item():.3g}, {worst:.3g} beyond its roundings"
        )


def adam(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    decoupled: bool,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    amsgrad: bool = False,
) -> tuple[Bounded, list[Bounded]]:
    """Kingma & Ba 2015, Alg. 1; Loshchilov & Hutter 2019, Alg. 2. g is unscaled, its sign that of descent,
    in float64."""
    beta1, beta2 = betas
    m, v = states[0], states[1]
    size = g.abs()
    if decoupled:
        decayed = p * (1 - lr * weight_decay)
    else:
        decayed, g, size = p, g + weight_decay * p, size + weight_decay * p.abs()
    m_size, v_size = beta1 * m.abs() + (1 - beta1) * size, beta2 * v + (1 - beta2) * size**2
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    # g: 2 roundings (unscaling, decay). m: those, w1, its product, beta1 and the fma. v: g twice, w2, 2
    # products, fma.
    m_error, v_error = 5 * u * m_size, 8 * u * v_size
    root = torch.maximum(states[2], v) if amsgrad else v
    denominator = (root / (1 - beta2**t)).sqrt() + eps
    move = (m / (1 - beta1**t)) / denominator
    # Denominator: half of v's relative error; square root, bias correction, eps, fma. Then the quotient.
    move_error = m_error / (1 - beta1**t) / denominator + move.abs() * (v_error / root / 2 + 5 * u)
    new_p = Bounded(decayed - lr * move, 3 * u * p.abs() + lr * (move_error + 2 * u * move.abs()))
    new_states = [Bounded(m, m_error), Bounded(v, v_error)]
    return new_p, new_states + ([Bounded(root, v_error)] if amsgrad else [])


def sgd(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Bounded, list[Bounded]]:
    """torch.optim.SGD's algorithm box. The first step puts the gradient into the buffer as it is."""
    size = g.abs() + weight_decay * p.abs()
    g = g + weight_decay * p
    move, error, buffers = g, 2 * u * size, []  # unscaling, decay
    if momentum:
        weight = 1.0 if t == 1 else 1 - dampening
        b_size = momentum * states[0].abs() + weight * size
        buffer = momentum * states[0] + weight * g
        b_error = 5 * u * b_size  # g, its weight and product, momentum, fma
        buffers = [Bounded(buffer, b_error)]
        move, error = buffer, b_error
        if nesterov:
            move, error = g + momentum * buffer, 7 * u * (size + momentum * b_size)
    return Bounded(p - lr * move, u * p.abs() + lr * (error + 2 * u * move.abs())), buffers


def step(call, index: int) -> tuple[Bounded, list[Bounded]]:
    """What the op must make of tensor `index` of a StepCall (not yet run), from its master where it has
    one."""
    options = dict(call.options)
    one = torch.ones((), dtype=torch.float32)
    factors = [options.pop(name, None) for name in ("inv_scale", "clip_coef")]
    scale = [one if f is None else f for f in factors]
    options.pop("found_inf", None)
    factor = (scale[0] * scale[1]).double() * (-1 if options.pop("maximize", False) else 1)
    options["lr"] = float(options["lr"])
    p = (call.masters or call.params)[index]
    u = 2.0**-53 if p.dtype == torch.float64 else 2.0**-24
    states = [one_list[index].double() for one_list in call.states if one_list]
    args = (p.double(), call.grads[index].double() * factor, states, int(call.steps[index]) + 1, u)
    if call.op == "sgd_":
        return sgd(*args, **options)
    return adam(*args, decoupled=call.op == "adamw_", **options)
