"""The rule of the policy "headroom", in plain Python, and a training loop that follows it."""

import math
import random
from collections import Counter, deque

import torch
from fusedamp import GradScaler, optim
from on_device import DEVICE
from torch import nn

INF = math.inf


def floor_log2(x):
    return math.frexp(x)[1] - 1


def exponent_of_quotient(x, y):
    """floor(log2(x / y)) of finite floats > 0, exactly: in whole numbers."""
    (a, b), (c, d) = x.as_integer_ratio(), y.as_integer_ratio()
    top, bottom = a * d, b * c
    guess = top.bit_length() - bottom.bit_length()
    smaller = top < bottom << guess if guess >= 0 else top << -guess < bottom
    return guess - smaller


class Model:
    """The rule in words."""

    def __init__(self, scale, *, bits, interval, floor=0.0, ceiling=INF):
        self.scale, self.bits, self.interval = scale, bits, interval
        powers = [k for k in range(-126, 128) if floor <= 2.0**k <= ceiling]
        self.low, self.high = powers[0], powers[-1]
        self.run = self.good = self.wait = 0
        self.patience = 64
        self.ring = deque(maxlen=512)

    def limited(self, k):
        return min(max(k, self.low), self.high)

    def exponent(self):
        if self.scale == INF:
            return self.high
        return self.limited(floor_log2(self.scale)) if self.scale > 0 else self.low

    def update(self, overflow, largest):
        k = self.exponent()
        if overflow:
            self.run += 1
            k -= min(2 ** (self.run - 1), 4)
            self.good = self.wait = 0
            if self.run == 1:
                self.patience = min(2 * self.patience, self.interval)
        else:
            self.run = 0
            self.good += 1
            if self.good >= self.interval:
                self.patience, self.good = max(self.patience // 2, 64), 0
            if 0 < largest < INF and 0 < self.scale < INF:
                self.ring.append(min(max(exponent_of_quotient(largest, self.scale), -40), 23))
            if self.ring:
                k = self.follow(k)
        self.scale = 2.0 ** self.limited(k)

    def follow(self, k):
        allowed = 2 * len(self.ring) // 512
        b = sorted(self.ring)[
            -1 - allowed
        ]  # reached by `allowed` + 1 of them, and by no more if it were larger
        want = self.limited(15 - b - self.bits)
        if k < want:
            self.wait += 1
            if self.wait < self.patience:
                return k
            want = k + 1
        self.wait = 0
        return want

    def state(self):
        """What the op's state must be, but for the place of each entry in the ring."""
        counts = Counter(self.ring)
        return [min(self.run, 3), self.good, self.wait, self.patience, len(self.ring)], [
            counts[b] for b in range(-40, 24)
        ]


def headroom(**options):
    return GradScaler(DEVICE, policy="headroom", **options)


def params_of(dtypes=(torch.float32,) * 3):
    return [nn.Parameter(torch.ones(4 + i, dtype=dtype)) for i, dtype in enumerate(dtypes)]


def fused(params, **options):
    return optim.AdamW(params, lr=1e-6, **options)


def give_gradients(rng, params, scale, unscaled):
    """Gradients whose largest element is ``unscaled``, negative, somewhere; returns the largest one as
    stored."""
    for param in params:
        param.grad = (torch.rand(param.shape, dtype=torch.float64) * unscaled * scale * 0.4).to(param.dtype)
    chosen = rng.choice(params)
    chosen.grad.view(-1)[rng.randrange(chosen.numel())] = -unscaled * scale
    largest = max(param.grad.double().abs().max().item() for param in params)
    return largest if math.isfinite(largest) else INF


def maxima(rng, steps):
    for _ in range(steps):
        yield 2.0 ** (rng.gauss(-3, 1) + (rng.random() < 0.02) * rng.choice([-10, 8, 14]))


def follow(scaler, optimizers, params, way, steps=250, seed=0):
    """Train, and compare the scale after each step with the model's."""
    rng = random.Random(seed)
    model = Model(scaler._init_scale, bits=scaler._headroom.bits, interval=scaler.get_growth_interval())
    scaler.scale(torch.ones(()))
    for unscaled in maxima(rng, steps):
        largest = give_gradients(rng, params, scaler.get_scale(), unscaled)
        overflow = largest >= 65520
        if overflow:
            largest = params[0].grad.view(-1)[0] = INF
        for optimizer in optimizers:
            way(scaler, optimizer)
            scaler.step(optimizer)
        scaler.update()
        model.update(overflow, largest)
        assert scaler.get_scale() == model.scale
    return scaler, model
