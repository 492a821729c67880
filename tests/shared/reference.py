"""Optimizers typed from their papers, in plain tensor algebra and FP64: what the kernels are held against.

Independent of the package on purpose, so that a formula that is wrong there is wrong here only by chance.
Each function takes one parameter, its gradient and its state (a dict, changed in place; empty at first) and
returns the new parameter. Symbols are the papers'. ``tolerances.Rounded`` may stand in for the tensors of
those that have an op: they add their terms in the op's order.
"""

import torch
from torch import Tensor


def adam(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    amsgrad: bool = False,
    maximize: bool = False,
    decoupled_weight_decay: bool = False,
) -> Tensor:
    """Kingma and Ba 2015, Alg. 1; decoupled: Loshchilov and Hutter 2019, Alg. 2; amsgrad: Reddi et al. 2018.

    As in torch, eta is 1, the learning rate multiplies the decoupled decay, and amsgrad keeps the maximum of
    the second moment before its bias correction.
    """
    beta1, beta2 = betas
    t = state["step"] = state.get("step", 0) + 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        theta = theta - lr * weight_decay * theta
    else:
        g = g + weight_decay * theta
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0 * theta) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * theta) + (1 - beta2) * g**2
    if amsgrad:
        v = state["max_exp_avg_sq"] = state.get("max_exp_avg_sq", 0 * theta).maximum(v)
    m_hat = m / (1 - beta1**t)
    v_hat = v / (1 - beta2**t)
    return theta - lr * m_hat / (v_hat.sqrt() + eps)


def adamw(theta: Tensor, g: Tensor, state: dict, *, weight_decay: float = 1e-2, **options) -> Tensor:
    return adam(theta, g, state, weight_decay=weight_decay, decoupled_weight_decay=True, **options)


def sgd(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    maximize: bool = False,
) -> Tensor:
    """Sutskever et al. 2013, with the velocity in units of gradients and torch's undampened first step."""
    t = state["step"] = state.get("step", 0) + 1
    d = (-g if maximize else g) + weight_decay * theta
    if momentum:
        part = 1.0 if t == 1 else 1 - dampening
        velocity = momentum * state.get("momentum_buffer", 0 * theta) + part * d
        state["momentum_buffer"] = velocity
        d = d + momentum * velocity if nesterov else velocity
    return theta - lr * d


def lion(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-4,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """Chen et al. 2023, Alg. 2. Records the argument of the sign as ``direction``."""
    beta1, beta2 = betas
    state["step"] = state.get("step", 0) + 1
    if maximize:
        g = -g
    m = state.get("exp_avg", 0 * theta)
    c = state["direction"] = beta1 * m + (1 - beta1) * g
    state["exp_avg"] = beta2 * m + (1 - beta2) * g
    return theta - lr * weight_decay * theta - lr * c.sign()


def adagrad(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-2,
    lr_decay: float = 0.0,
    weight_decay: float = 0.0,
    initial_accumulator_value: float = 0.0,
    eps: float = 1e-10,
    maximize: bool = False,
) -> Tensor:
    """Duchi et al. 2011, Fig. 1 with diagonal matrices; the rate decays as in torch."""
    t = state["step"] = state.get("step", 0) + 1
    g = (-g if maximize else g) + weight_decay * theta
    s = state["sum"] = state.get("sum", 0 * theta + initial_accumulator_value) + g**2
    return theta - lr / (1 + (t - 1) * lr_decay) * g / (s.sqrt() + eps)


def rmsprop(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-2,
    alpha: float = 0.99,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum: float = 0.0,
    centered: bool = False,
    maximize: bool = False,
) -> Tensor:
    """Tieleman and Hinton 2012; centered: Graves 2013, eq. 38 to 41. The momentum is torch's: of quotients.

    Notes the ``variance``, which is the mean square where nothing is centered.
    """
    state["step"] = state.get("step", 0) + 1
    g = (-g if maximize else g) + weight_decay * theta
    n = state["square_avg"] = alpha * state.get("square_avg", 0 * theta) + (1 - alpha) * g**2
    if centered:
        mean = state["grad_avg"] = alpha * state.get("grad_avg", 0 * theta) + (1 - alpha) * g
        n = n - mean**2
    state["variance"] = n
    delta = g / (n.sqrt() + eps)
    if momentum:
        delta = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0 * theta) + delta
    return theta - lr * delta


def radam(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Tensor:
    """Liu et al. 2020, Alg. 2. As in torch, eps is added to the root of v, and rho must exceed 5.

    Notes what multiplies m_hat as ``rate``, and as ``condition`` how much larger its relative error is than
    that of the powers of beta2, whose differences it is made of.
    """
    beta1, beta2 = betas
    t = state["step"] = state.get("step", 0) + 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        theta = theta - lr * weight_decay * theta
    else:
        g = g + weight_decay * theta
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0 * theta) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * theta) + (1 - beta2) * g**2
    m_hat = m / (1 - beta1**t)
    rho_inf = 2 / (1 - beta2) - 1
    rho = rho_inf - 2 * t * beta2**t / (1 - beta2**t)
    state["rate"] = 1.0
    if rho > 5:
        r = ((rho - 4) * (rho - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * rho)) ** 0.5
        state["condition"] = 2 * t * rho_inf / (1 - beta2**t) / (rho - 4)
        state["rate"] = r * (1 - beta2**t) ** 0.5 / (v.sqrt() + eps)
    return theta - lr * state["rate"] * m_hat


def adafactor(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-2,
    beta2_decay: float = -0.8,
    eps: tuple[float, float] = (1e-6, 1e-3),
    d: float = 1.0,
    weight_decay: float = 0.0,
    maximize: bool = False,
) -> Tensor:
    """Shazeer and Stern 2018, Alg. 4 (matrices) and 5 (vectors), with torch's reading of lr, eps1 and decay.

    The last two dimensions are factored: the second moment is R C / mean(R), where R and C are decayed means
    of the squared gradient over columns and rows.
    """
    t = state["step"] = state.get("step", 0) + 1
    beta2 = 1 - t**beta2_decay
    if maximize:
        g = -g

    def decayed(name: str, fresh: Tensor) -> Tensor:
        state[name] = beta2 * state.get(name, 0 * fresh) + (1 - beta2) * fresh
        return state[name]

    def rms(x: Tensor) -> float:
        return (x**2).mean().sqrt().item() if x.numel() else 0.0

    if g.dim() < 2:
        v = decayed("variance", g**2)
    else:
        rows, columns = (decayed(name, (g**2).sum(dim, keepdim=True) / max(g.shape[dim], 1))
                         for name, dim in (("row_var", -1), ("col_var", -2)))  # fmt: skip
        mean = rows.sum(-2, keepdim=True) / max(rows.shape[-2], 1)
        v = rows @ columns / mean.clamp(min=eps[0])
    u = g / v.sqrt().clamp(min=eps[0])
    alpha = max(eps[1], rms(theta)) * min(lr, t**-0.5) / max(1.0, rms(u) / d)
    state["rate"] = alpha / v.sqrt().clamp(min=eps[0])  # of an element of the gradient
    return (1 - lr * weight_decay) * theta - alpha * u


def muon(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    weight_decay: float = 0.1,
    momentum: float = 0.95,
    nesterov: bool = True,
    adjust_lr_fn: str | None = None,
    maximize: bool = False,
    ns_dtype: torch.dtype = torch.bfloat16,
) -> Tensor:
    """Jordan et al. 2024, in exact arithmetic whatever ``ns_dtype``: the polynomial acts on singular values.

    AdamW with betas 0.9 and 0.95 for non-matrix parameters.
    """
    if theta.dim() != 2:
        options = dict(lr=lr, weight_decay=weight_decay, maximize=maximize, betas=(0.9, 0.95))
        return adam(theta, g, state, decoupled_weight_decay=True, **options)
    state["step"] = state.get("step", 0) + 1
    g = -g if maximize else g
    b = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0 * g) + (1 - momentum) * g
    u = (1 - momentum) * g + momentum * b if nesterov else b
    state["length"] = length = u.pow(2).sum().sqrt().item()  # the Frobenius norm
    left, sigma, right = torch.linalg.svd(u / max(length, 1e-7), full_matrices=False)
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.775 * sigma**3 + 2.0315 * sigma**5
    rows, columns = theta.shape
    if adjust_lr_fn == "match_rms_adamw":
        ratio = 0.2 * max(rows, columns) ** 0.5
    else:
        ratio = max(1.0, rows / max(columns, 1)) ** 0.5
    state["ratio"] = ratio
    return (1 - lr * weight_decay) * theta - lr * ratio * left @ torch.diag(sigma) @ right


def nadam(
    theta: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 2e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    momentum_decay: float = 4e-3,
    decoupled_weight_decay: bool = False,
    maximize: bool = False,
) -> Tensor:
    """Dozat 2016, Alg. 2, with the schedule of momentum that the paper recommends. Notes how much of gradient
    and momentum it takes, together, as ``parts``.
    """
    beta1, beta2 = betas
    t = state["step"] = state.get("step", 0) + 1
    if maximize:
        g = -g
    if decoupled_weight_decay:
        theta = theta - lr * weight_decay * theta
    else:
        g = g + weight_decay * theta
    mu_t = beta1 * (1 - 0.5 * 0.96 ** (t * momentum_decay))
    mu_next = beta1 * (1 - 0.5 * 0.96 ** ((t + 1) * momentum_decay))
    product = state["mu_product"] = state.get("mu_product", 1.0) * mu_t
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0 * theta) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * theta) + (1 - beta2) * g**2
    g_part, m_part = (1 - mu_t) / (1 - product), mu_next / (1 - product * mu_next)
    state["parts"] = g_part + m_part
    return theta - lr * (g_part * g + m_part * m) / ((v / (1 - beta2**t)).sqrt() + eps)


def lamb(
    x: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    weight_decay: float = 0.01,
    bias_correction: bool = True,
    trust_clip: float = float("inf"),
    adapt: bool = True,
    maximize: bool = False,
) -> Tensor:
    """You et al. 2020, Alg. 2, with phi(z) = z. Notes the direction as ``u``, its factor as ``ratio``."""
    beta1, beta2 = betas
    t = state["step"] = state.get("step", 0) + 1
    g = -g if maximize else g
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0 * x) + (1 - beta1) * g
    v = state["exp_avg_sq"] = beta2 * state.get("exp_avg_sq", 0 * x) + (1 - beta2) * g**2
    if bias_correction:
        m, v = m / (1 - beta1**t), v / (1 - beta2**t)
    state["denominator"] = v.sqrt() + eps
    u = state["u"] = m / state["denominator"] + weight_decay * x
    ratio = 1.0
    if adapt and x.norm() > 0 and u.norm() > 0:
        ratio = min(x.norm() / u.norm(), trust_clip)
    state["ratio"] = ratio
    return x - lr * ratio * u


def lars(
    w: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    trust_coefficient: float = 1e-3,
    eps: float = 1e-8,
    nesterov: bool = False,
    adapt: bool = True,
    maximize: bool = False,
) -> Tensor:
    """You et al. 2017, Alg. 1, gamma outside of the velocity. Notes the local rate as ``ratio``."""
    state["step"] = state.get("step", 0) + 1
    g = -g if maximize else g
    ratio = 1.0
    if adapt and w.norm() > 0 and g.norm() > 0:
        ratio = trust_coefficient * w.norm() / (g.norm() + weight_decay * w.norm() + eps)
    state["ratio"] = ratio
    g = ratio * (g + weight_decay * w)
    v = state["momentum_buffer"] = momentum * state.get("momentum_buffer", 0 * w) + g
    return w - lr * (g + momentum * v if nesterov else v)


def novograd(
    w: Tensor,
    g: Tensor,
    state: dict,
    *,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.95, 0.98),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_averaging: bool = False,
    maximize: bool = False,
) -> Tensor:
    """Ginsburg et al. 2019, Alg. 1. Records the size of the first moment's input as ``size``."""
    beta1, beta2 = betas
    t = state["step"] = state.get("step", 0) + 1
    g = -g if maximize else g
    squares = g.square().sum()
    v = state["exp_avg_sq"] = squares if t == 1 else beta2 * state["exp_avg_sq"] + (1 - beta2) * squares
    part = 1 - beta1 if grad_averaging else 1.0
    state["size"] = part * (g.abs() / (v.sqrt() + eps) + weight_decay * w.abs())
    g = g / (v.sqrt() + eps) + weight_decay * w
    m = state["exp_avg"] = beta1 * state.get("exp_avg", 0 * w) + part * g
    return w - lr * m
