"""The random numbers of csrc/math/random.h, in NumPy."""

import numpy as np

_MASK = (1 << 64) - 1
WEIGHT = 3  # the list of a weight without a master; states are lists 0, 1 and 2


def _mix(x: int) -> int:
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def key(seed: int, step: int, list_: int, which: int = 0) -> tuple[int, int]:
    """Two words of 32 bits for each list and each 2^34 elements of a tensor; lists 0 and 1 share them."""
    stream = _mix((_mix((seed + 0x9E3779B97F4A7C15) & _MASK) + step) & _MASK)
    number = 4 * which + (0 if list_ == 1 else list_)
    mixed = _mix(stream ^ ((number + 1) * 0x9E3779B97F4A7C15 & _MASK))
    return mixed & 0xFFFFFFFF, mixed >> 32


def words(key_: tuple[int, int], first: int, count: int) -> np.ndarray:
    """The words of ``count`` times four elements, from four times ``first`` on."""
    x = np.arange(first, first + count, dtype=np.uint64).astype(np.uint32)
    outer, inner = (np.uint32(half) for half in key_)
    x = x * np.uint32(0x9E3779B1) + outer
    x = (x ^ (x >> np.uint32(16))) * np.uint32(0x21F0AAAD)
    x = ((x ^ (x >> np.uint32(15))) + inner) * np.uint32(0xD35A2D97)
    return x ^ (x >> np.uint32(15))


def parts(words_: np.ndarray, list_: int) -> np.ndarray:
    """The 16 bits of each element: bytes e and e + 1 of the four as a ring; for list 1, e + 2 and e + 3."""
    rows = words_.astype("<u4").view(np.uint8).reshape(-1, 4).astype(np.uint16)
    turn = 2 if list_ == 1 else 0
    low, high = (np.roll(rows, -turn - more, axis=1) for more in (0, 1))
    return (low | high << np.uint16(8)).reshape(-1)
