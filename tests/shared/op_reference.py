"""The update rules in float64, typed from the papers, each result with a bound on the op's rounding error.

The bounds count roundings, to first order, in multiples of the unit roundoff u (2^-24; 2^-53 for float64
weights): one for each operation and one for each coefficient that is rounded. Where terms may cancel, they
are relative to the sum of magnitudes. SLACK covers the second order; float64 references commit as many
roundings as the op, hence twice the bound.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

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


def lion(
    p: Tensor, g: Tensor, states: list[Tensor], t: int, u: float, *, lr: float, betas, weight_decay: float
) -> tuple[Bounded, list[Bounded]]:
    """Chen et al. 2023, Alg. 2. Where roundings may turn the sign, the element may move either way."""
    beta1, beta2 = betas
    m = states[0]
    direction, size = beta1 * m + (1 - beta1) * g, beta1 * m.abs() + (1 - beta1) * g.abs()
    unsure = direction.abs() <= 5 * u * size  # unscaling, two weights, a product, fma
    move = direction.sign()
    error = 3 * u * p.abs() + lr * (2.0 * unsure + 2 * u)
    new_m, m_size = beta2 * m + (1 - beta2) * g, beta2 * m.abs() + (1 - beta2) * g.abs()
    return Bounded(p * (1 - lr * weight_decay) - lr * move, error), [Bounded(new_m, 5 * u * m_size)]


def quotient(g: Bounded, square: Bounded, eps: float, u: float) -> Bounded:
    """g / (sqrt(square) + eps): half the relative error of the square; root, eps, sum; the quotient."""
    denominator = square.value.sqrt() + eps
    move = g.value / denominator
    relative = square.error / square.value / 2 + 4 * u
    return Bounded(move, g.error / denominator + move.abs() * relative)


def adagrad(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    lr_decay: float,
    eps: float,
    weight_decay: float,
) -> tuple[Bounded, list[Bounded]]:
    """Duchi et al. 2011, Fig. 1; torch.optim.Adagrad's algorithm box."""
    size = g.abs() + weight_decay * p.abs()
    g = g + weight_decay * p
    total = states[0] + g * g
    new_sum = Bounded(total, 4 * u * size**2 + u * total)
    move = quotient(Bounded(g, 2 * u * size), new_sum, eps, u)
    lr = lr / (1 + (t - 1) * lr_decay)
    error = u * p.abs() + lr * (move.error + 2 * u * move.value.abs())
    return Bounded(p - lr * move.value, error), [new_sum]


def rmsprop(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    centered: bool,
    lr: float,
    alpha: float,
    eps: float,
    weight_decay: float,
    momentum: float = 0.0,
) -> tuple[Bounded, list[Bounded]]:
    """torch.optim.RMSprop's algorithm box; Graves 2013, eq. 38 to 41."""
    size = g.abs() + weight_decay * p.abs()
    g = g + weight_decay * p
    v = alpha * states[0] + (1 - alpha) * g * g
    square = Bounded(v, 8 * u * (alpha * states[0] + (1 - alpha) * size**2))
    new_states = [square]
    if centered:
        mean = alpha * states[1] + (1 - alpha) * g
        mean_error = 5 * u * (alpha * states[1].abs() + (1 - alpha) * size)
        new_states.append(Bounded(mean, mean_error))
        variance = v - mean * mean
        square = Bounded(variance, square.error + 2 * mean.abs() * mean_error + u * variance)
    move = quotient(Bounded(g, 2 * u * size), square, eps, u)
    if momentum:
        old = momentum * states[-1]
        buffer = old + move.value
        move = Bounded(buffer, move.error + 2 * u * old.abs() + u * move.value.abs())
        new_states.append(move)
    error = u * p.abs() + lr * (move.error + 2 * u * move.value.abs())
    return Bounded(p - lr * move.value, error), new_states


def moments(
    g: Tensor, size: Tensor, states: list[Tensor], betas: tuple[float, float], u: float
) -> tuple[Bounded, Bounded]:
    """The first two moments, as in adam() above; ``size``: of the gradient's terms before they cancel."""
    beta1, beta2 = betas
    m, v = beta1 * states[0] + (1 - beta1) * g, beta2 * states[1] + (1 - beta2) * g * g
    new_m = Bounded(m, 5 * u * (beta1 * states[0].abs() + (1 - beta1) * size))
    return new_m, Bounded(v, 8 * u * (beta2 * states[1] + (1 - beta2) * size**2))


def radam(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    decoupled_weight_decay: bool = False,
) -> tuple[Bounded, list[Bounded]]:
    """Liu et al. 2020, Alg. 2; eps beside the root of the uncorrected moment, as in torch."""
    beta1, beta2 = betas
    size, start = g.abs(), p
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g, size = g + weight_decay * p, size + weight_decay * p.abs()
    new_m, new_v = moments(g, size, states, betas, u)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    move = new_m
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        lr *= r * (1 - beta2**t) ** 0.5
        move = quotient(new_m, new_v, eps, u)
    lr /= 1 - beta1**t
    error = 3 * u * start.abs() + lr * (move.error + 2 * u * move.value.abs())
    return Bounded(p - lr * move.value, error), [new_m, new_v]


def nadam(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
) -> tuple[Bounded, list[Bounded]]:
    """torch.optim.NAdam's algorithm box. The products of momentums are made in fp64."""
    beta1, beta2 = betas
    size, start = g.abs(), p
    if decoupled_weight_decay:
        p = p - lr * weight_decay * p
    else:
        g, size = g + weight_decay * p, size + weight_decay * p.abs()
    new_m, new_v = moments(g, size, states, betas, u)
    mu, mu_next = (beta1 * (1 - 0.5 * 0.96 ** (n * momentum_decay)) for n in (t, t + 1))
    product = states[2] * mu
    g_part, m_part = (1 - mu) / (1 - product), mu_next / (1 - product * mu_next)
    numerator = g_part * g + m_part * new_m.value
    error = 5 * u * g_part * size + m_part * (new_m.error + 3 * u * new_m.value.abs())
    root = Bounded(new_v.value / (1 - beta2**t), new_v.error / (1 - beta2**t))
    move = quotient(Bounded(numerator, error), root, eps, u)
    error = 3 * u * start.abs() + lr * (move.error + 2 * u * move.value.abs())
    # fp64: a power of t factors, and products.
    return Bounded(p - lr * move.value, error), [new_m, new_v, Bounded(product, (t + 9) * 2.0**-53 * product)]


def norm(values: Bounded) -> tuple[float, float]:
    """The norm of a whole tensor, and its relative error."""
    exact = values.value.norm().item()
    return exact, values.error.norm().item() / exact if exact else 0.0


def lamb(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    bias_correction: bool = True,
    trust_clip: float = float("inf"),
    adapt: bool = True,
) -> tuple[Bounded, list[Bounded]]:
    """You et al. 2020, Alg. 2, the trust ratio bounded by trust_clip."""
    new_m, new_v = moments(g, g.abs(), states, betas, u)
    bias1, bias2 = ((1 - beta**t if bias_correction else 1.0) for beta in betas)
    corrected = Bounded(new_m.value / bias1, (new_m.error + 2 * u * new_m.value.abs()) / bias1)
    move = quotient(corrected, Bounded(new_v.value / bias2, (new_v.error + u * new_v.value) / bias2), eps, u)
    error = move.error + 2 * u * (move.value.abs() + weight_decay * p.abs())
    move = Bounded(move.value + weight_decay * p, error)
    (w_norm, _), (u_norm, relative) = norm(Bounded(p, 0 * p)), norm(move)
    ratio = min(w_norm / u_norm, trust_clip) if adapt and w_norm and u_norm else 1.0
    error = u * p.abs() + lr * ratio * (move.error + move.value.abs() * (relative + 3 * u))
    return Bounded(p - lr * ratio * move.value, error), [new_m, new_v]


def lars(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    momentum: float,
    weight_decay: float,
    trust_coefficient: float,
    eps: float,
    nesterov: bool = False,
    adapt: bool = True,
) -> tuple[Bounded, list[Bounded]]:
    """You et al. 2017, Alg. 1; lr outside of the momentum."""
    w_norm, g_norm = p.norm().item(), g.norm().item()
    ratio = 1.0
    if adapt and w_norm and g_norm:
        ratio = trust_coefficient * w_norm / (g_norm + weight_decay * w_norm + eps)
    size = ratio * (g.abs() + weight_decay * p.abs())
    g = ratio * (
        g + weight_decay * p
    )  # unscaling, decay, its fma; the norm's unscaling, the ratio, a product
    buffer = momentum * states[0] + g
    error = 6 * u * size + 2 * u * (momentum * states[0]).abs() + u * buffer.abs()
    move = Bounded(buffer, error)
    if nesterov:
        value = g + momentum * buffer
        move = Bounded(value, 6 * u * size + momentum * (error + u * buffer.abs()) + u * value.abs())
    error_p = u * p.abs() + lr * (move.error + 2 * u * move.value.abs())
    return Bounded(p - lr * move.value, error_p), [Bounded(buffer, error)]


def novograd(
    p: Tensor,
    g: Tensor,
    states: list[Tensor],
    t: int,
    u: float,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    grad_averaging: bool = False,
) -> tuple[Bounded, list[Bounded]]:
    """Ginsburg et al. 2019, Alg. 1; grad_averaging as its published code has it."""
    beta1, beta2 = betas
    squares = (g * g).sum()
    v = squares if t == 1 else beta2 * states[1] + (1 - beta2) * squares
    denominator = v.sqrt() + eps
    size = g.abs() / denominator + weight_decay * p.abs()
    g = g / denominator + weight_decay * p
    part = 1 - beta1 if grad_averaging else 1.0
    m = beta1 * states[0] + part * g
    error = 8 * u * part * size + 2 * u * beta1 * states[0].abs() + u * m.abs()
    new_m, new_v = Bounded(m, error), Bounded(v, 3 * u * squares + 64 * 2.0**-53 * v)
    return Bounded(p - lr * m, u * p.abs() + lr * (error + 2 * u * m.abs())), [new_m, new_v]


RULES: dict[str, Callable] = {
    "adamw_": partial(adam, decoupled=True),
    "adam_": partial(adam, decoupled=False),
    "sgd_": sgd,
    "lion_": lion,
    "adagrad_": adagrad,
    "rmsprop_": partial(rmsprop, centered=False),
    "rmsprop_centered_": partial(rmsprop, centered=True),
    "radam_": radam,
    "nadam_": nadam,
    "lamb_": lamb,
    "lars_": lars,
    "novograd_": novograd,
}


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
    return RULES[call.op](*args, **options)
