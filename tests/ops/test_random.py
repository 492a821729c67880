"""The random numbers of low-bit states and weights: which they are, and that 10^8 of them show no pattern."""

import itertools

import numpy as np
import pytest
import random_model as model
import torch
from fusedamp import ops

NUMEL = 4096 + 3
THRESHOLDS = (1, 255, 256, 20_000, 32_768, 45_057, 65_280, 65_535)


def rounded_up(list_: int, seed: int, step: int, threshold: int) -> np.ndarray:
    """Whether each element of a list was rounded up, of which the 16 bits below BF16 are ``threshold``."""
    share, kw = threshold * 2.0**-23, dict(steps=[torch.tensor(float(step - 1))], seeds=[seed])
    if list_ == model.WEIGHT:  # 1 + share
        weight = torch.ones(NUMEL, dtype=torch.bfloat16)
        ops.sgd_([weight], [torch.full((NUMEL,), -share)], [], [], lr=1.0, stochastic_rounding=True, **kw)
        return (weight != 1).cpu().numpy()
    grad = torch.full((NUMEL,), 1 + share if list_ == 0 else 0.0)
    states = [torch.ones(NUMEL, dtype=torch.bfloat16) for _ in range(2)]
    betas = (0.0, 0.5 + share / 2)  # the first state is the gradient, the second is 1 times beta2
    ops.adamw_(
        [torch.zeros(NUMEL)], [grad], states[:1], states[1:], [], [], lr=0.0, betas=betas, eps=1.0,
        weight_decay=0.0, **kw,
    )  # fmt: skip
    return (states[list_] != (1.0 if list_ == 0 else 0.5)).cpu().numpy()


@pytest.mark.parametrize("list_", [0, 1, model.WEIGHT])
@pytest.mark.parametrize(("seed", "step"), [(0, 1), (0, 2), (2**31 - 1, 1000)])
def test_the_model(list_, seed, step):
    """The engine's numbers are the model's: each rounds up just where it carries into BF16's last place."""
    random = model.parts(model.words(model.key(seed, step, list_), 0, -(-NUMEL // 4)), list_)[:NUMEL]
    for threshold in THRESHOLDS:
        up = rounded_up(list_, seed, step, threshold)
        assert (up == (random.astype(int) + threshold >= 65536)).all()


WORDS = 25_000_000  # for 10^8 elements
CHUNK = 2**20


def moments(streams) -> np.ndarray:
    """The correlation matrix of numbers that arrive in pieces, one row for each of them."""
    total, products, count = 0.0, 0.0, 0
    for rows in streams:
        rows = rows.astype(np.float64) - 32767.5
        total = total + rows.sum(1)
        products = products + rows @ rows.T
        count += rows.shape[1]
    covariance = products / count - np.outer(total, total) / count**2
    deviation = np.sqrt(np.diag(covariance))
    assert np.abs(total / count).max() < 6 * 65536 / (12 * count) ** 0.5  # no bias
    return covariance / np.outer(deviation, deviation)


def unrelated(matrix: np.ndarray, count: int) -> None:
    off = matrix - np.eye(len(matrix))
    assert np.abs(off).max() < 6 / count**0.5, np.abs(off).max() * count**0.5


@pytest.mark.slow
@pytest.mark.parametrize("step", [1, 12345])
def test_distances(step):
    """Numbers that are 4 to 4096 elements apart, of 10^8, are unrelated; adjacent ones share a byte, so their
    correlation is 1/256."""
    key_ = model.key(7, step, 0)
    lags = (0, 1, 2, 3, 4, 8, 16, 32, 64, 256, 1024)

    def pieces():
        for first in range(0, WORDS, CHUNK):
            halves = model.parts(model.words(key_, first, CHUNK + max(lags)), 0)[::4]
            yield np.stack([halves[lag : lag + CHUNK] for lag in lags])

    unrelated(moments(pieces()), WORDS)
    four = moments(
        model.parts(model.words(key_, first, CHUNK), 0).reshape(-1, 4).T for first in range(0, WORDS, CHUNK)
    )
    ring = sum(np.roll(np.eye(4), shift, axis=1) for shift in (1, 3)) / 256
    unrelated(four - ring, WORDS)


@pytest.mark.slow
def test_lists_steps_and_seeds():
    """Both states of an element, the weight, other steps and other seeds draw unrelated numbers."""
    keys = [
        (1, 1, 0),
        (1, 1, 1),
        (1, 1, 2),
        (1, 1, 3),
        (1, 2, 0),
        (1, 3, 0),
        (2, 1, 0),
        (2, 2, 1),
        (2**30, 1, 0),
    ]

    def pieces():
        for first in range(0, WORDS, CHUNK):
            rows = [model.parts(model.words(model.key(*k), first, CHUNK), k[2])[::4] for k in keys]
            yield np.stack(rows)

    unrelated(moments(pieces()), WORDS)


@pytest.mark.slow
def test_every_bit_is_fair():
    """In each bit of 25 million words, alone and together with each other bit."""
    key_, ones, pairs = model.key(3, 4, 0), np.zeros(32), np.zeros((32, 32))
    for first in range(0, WORDS, CHUNK):
        bits = np.unpackbits(
            model.words(key_, first, CHUNK).view(np.uint8).reshape(-1, 4), axis=1, bitorder="little"
        )
        bits = bits.astype(np.float32)
        ones += bits.sum(0, dtype=np.float64)
        pairs += bits.T @ bits
    count = -(-WORDS // CHUNK) * CHUNK
    limit = 6 / count**0.5
    assert np.abs(ones / count - 0.5).max() < limit / 2
    for one, other in itertools.combinations(range(32), 2):
        assert abs(pairs[one, other] / count - 0.25) < limit * 0.75**0.5 / 2
