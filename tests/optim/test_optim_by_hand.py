"""Optimizers that torch.optim lacks, computed a second time: element by element, and by hand.

The formulas share nothing with ``reference.py``. States are unrolled: sums over all steps so far.
"""

import math
from collections import defaultdict

import pytest
import torch
from cases import BY_NAME, CASES, make_params, set_grads
from fusedamp import optim
from test_optim_parity import Trajectory

STEPS = 8
SHAPES = [(1,), (7,), (), (3, 5), (0,), (33,)]


def unrolled(terms, beta):
    """Returns the state that starts at 0 and, at each step, decays by ``beta`` and adds a term."""
    return math.fsum(beta**age * term for age, term in enumerate(reversed(terms)))


def lion(weights, grad, past, *, lr, weight_decay, betas=(0.9, 0.99)):
    """Chen et al. 2023, Alg. 2."""
    beta1, beta2 = betas
    *before, _ = past["grads"] = [*past["grads"], grad]
    for i, weight in enumerate(weights):
        momentum = (1 - beta2) * unrolled([g[i] for g in before], beta2)
        direction = beta1 * momentum + (1 - beta1) * grad[i]
        sign = math.copysign(1.0, direction) if direction else 0.0
        yield weight - lr * (sign + weight_decay * weight)


def lamb(
    weights,
    grad,
    past,
    *,
    lr,
    weight_decay,
    betas=(0.9, 0.999),
    eps=1e-6,
    bias_correction=True,
    trust_clip=math.inf,
):
    """You et al. 2020, Alg. 2. A corrected moment is a weighted mean: its weights add up to 1."""
    past["grads"].append(grad)
    ones, direction = [1.0] * len(past["grads"]), []
    total1, total2 = (unrolled(ones, b) if bias_correction else 1 / (1 - b) for b in betas)
    for i, weight in enumerate(weights):
        mean = unrolled([g[i] for g in past["grads"]], betas[0]) / total1
        square = unrolled([g[i] ** 2 for g in past["grads"]], betas[1]) / total2
        direction.append(mean / (math.sqrt(square) + eps) + weight_decay * weight)
    ratio = 1.0
    if any(weights) and any(direction):
        ratio = min(math.hypot(*weights) / math.hypot(*direction), trust_clip)
    yield from (w - lr * ratio * d for w, d in zip(weights, direction, strict=True))


def lars(weights, grad, past, *, lr, weight_decay, trust_coefficient, momentum=0.9, eps=1e-8, nesterov=False):
    """You et al. 2017, Alg. 1, with the learning rate outside of the momentum."""
    rate = 1.0
    if any(weights) and any(grad):
        size = math.hypot(*weights)
        rate = trust_coefficient * size / (math.hypot(*grad) + weight_decay * size + eps)
    past["terms"].append([rate * (g + weight_decay * w) for g, w in zip(grad, weights, strict=True)])
    for i, weight in enumerate(weights):
        terms = [term[i] for term in past["terms"]]
        # Nesterov's look-ahead: one more decay, and the newest term once more.
        ahead = [*terms, terms[-1]] if nesterov else terms
        yield weight - lr * unrolled(ahead, momentum)


def novograd(weights, grad, past, *, lr, weight_decay, betas=(0.95, 0.98), eps=1e-8, grad_averaging=False):
    """Ginsburg et al. 2019, Alg. 1. The first square starts the second moment undamped."""
    beta1, beta2 = betas
    first, *others = past["squares"] = [*past["squares"], math.hypot(*grad) ** 2]
    second_moment = beta2 ** len(others) * first + (1 - beta2) * unrolled(others, beta2)
    size = math.sqrt(second_moment) + eps
    past["terms"].append([g / size + weight_decay * w for g, w in zip(grad, weights, strict=True)])
    for i, weight in enumerate(weights):
        moment = unrolled([term[i] for term in past["terms"]], beta1)
        yield weight - lr * moment * (1 - beta1 if grad_averaging else 1.0)


SCALAR = {optim.Lion: lion, optim.LAMB: lamb, optim.LARS: lars, optim.NovoGrad: novograd}


@pytest.mark.parametrize("case", [case for case in CASES if case.ours in SCALAR], ids=str)
def test_reference_matches_scalars(case):
    """Guards the reference itself: what is computed by element agrees to FP64 roundings."""
    params = make_params(torch.float64, SHAPES)
    references = [Trajectory(case, p) for p in params]
    weights, past = [p.detach().flatten().tolist() for p in params], [defaultdict(list) for _ in params]
    options = dict(case.options)
    sign = -1.0 if options.pop("maximize", False) else 1.0
    for step in range(STEPS):
        for i, grad in enumerate(set_grads(params, step)):
            references[i].step(grad)
            flat = (sign * grad).flatten().tolist()
            weights[i] = [*SCALAR[case.ours](weights[i], flat, past[i], **options)]
    for expected, exact in zip(weights, references, strict=True):
        error = (torch.tensor(expected, dtype=torch.float64) - exact.p.flatten()).abs()
        assert (error <= 2 * exact.p_tolerance(torch.float64).flatten()).all(), error.max()


# Every number in these is exact in FP32, the results too. Norms: 5 of (3, 4), 1.25 of (1, 0.75).
BY_HAND = [
    # Step 1: c = 0.5, m = 0.25. Step 2: c = 0.125 - 1 < 0; the decay takes 1/8 each time.
    ("lion", dict(lr=0.25, weight_decay=0.5, betas=(0.5, 0.75)), [1.0], [[1.0], [-2.0]], [0.796875]),
    # u = (1, -1) / (1 + 3) + (3, 4) / 4 = (1, 0.75); the ratio is 4, or clipped to 2.
    (
        "lamb",
        dict(lr=0.25, weight_decay=0.25, betas=(0.5, 0.75), eps=3.0),
        [3.0, 4.0],
        [[1.0, -1.0]],
        [2.0, 3.25],
    ),
    (
        "lamb",
        dict(lr=0.25, weight_decay=0.25, betas=(0.5, 0.75), eps=3.0, trust_clip=2.0),
        [3.0, 4.0],
        [[1.0, -1.0]],
        [2.5, 3.625],
    ),
    # Step 1: the rate is 1.25 * 5 / (10 + 1.25 + 1.25) = 0.5, v = (3.375, 4.5), w = (1.3125, 1.75).
    # Step 2: no gradient, so the rate is 1, and v = (3.375, 4.5) / 2 + w / 4.
    (
        "lars",
        dict(lr=0.5, weight_decay=0.25, trust_coefficient=1.25, momentum=0.5, eps=1.25),
        [3.0, 4.0],
        [[6.0, 8.0], [0.0, 0.0]],
        [0.3046875, 0.40625],
    ),
    # v = 25 after both steps. Step 1: m = (3, 4) / 8 + w / 2 = (0.875, 1.5), w = (0.5625, 1.25).
    # Step 2: m = (0.875, 1.5) / 2 + (-4, 3) / 8 + w / 2 = (0.21875, 1.75).
    (
        "novograd",
        dict(lr=0.5, weight_decay=0.5, betas=(0.5, 0.75), eps=3.0),
        [1.0, 2.0],
        [[3.0, 4.0], [-4.0, 3.0]],
        [0.453125, 0.375],
    ),
]


@pytest.mark.parametrize(("name", "options", "start", "grads", "expected"), BY_HAND)
def test_numbers_computed_by_hand(name, options, start, grads, expected):
    """Guards the optimizer, the reference and the scalars: all are exact here."""
    for dtype in (torch.float32, torch.float64):
        param = torch.nn.Parameter(torch.tensor(start, dtype=dtype))
        optimizer = BY_NAME[name].ours([param], **options)
        for grad in grads:
            param.grad = torch.tensor(grad, dtype=dtype)
            optimizer.step()
        assert param.tolist() == expected
    weights, state, past = torch.tensor(start, dtype=torch.float64), {}, defaultdict(list)
    scalars = start
    for grad in grads:
        exact = torch.tensor(grad, dtype=torch.float64)
        weights = BY_NAME[name].reference(weights, exact, state, **options)
        scalars = [*SCALAR[BY_NAME[name].ours](scalars, grad, past, **options)]
    assert weights.tolist() == scalars == expected
