"""The order of samples: a function of seed and position alone, so that ranks, micro-batches and restarts cannot
change it.

Each pass is a permutation of the samples that can be asked at any place without being laid out: a generalised Feistel
network on pairs of digits, and cycle-walking where it is a little larger than the data (Black and Rogaway, "Ciphers
with arbitrary finite domains", CT-RSA 2002).
"""

from __future__ import annotations

from math import isqrt

import numpy as np

_ROUNDS = 8
_ODD = np.uint64(0x9E3779B97F4A7C15)
_MASK = (1 << 64) - 1


def sample_index(seed: int, position: np.ndarray | int, n: int) -> np.ndarray:
    """Which sample is at each place of the endless order.

    Args:
        seed: any integer. position: places from 0 on; place p is in pass ``p // n``, and each pass visits every
        sample once, in its own order. n: number of samples.

    Returns:
        Samples, int64, in the shape of ``position``.
    """
    if n < 1:
        raise ValueError("there are no samples to order")
    place = np.atleast_1d(np.asarray(position, dtype=np.int64)).astype(np.uint64)
    passes, x = np.divmod(place, np.uint64(n))
    key = mix(mix(np.full_like(passes, seed & _MASK)) + passes * _ODD)
    high = isqrt(n - 1) + 1  # digits: x = high digit * low + low digit, with high * low >= n and less than n + high
    low = -(-n // high)
    x = _permute(x, key, high, low)
    while (outside := x >= n).any():
        x[outside] = _permute(x[outside], key[outside], high, low)
    return x.astype(np.int64).reshape(np.shape(position))


def _permute(x: np.ndarray, key: np.ndarray, high: int, low: int) -> np.ndarray:
    a, b = np.divmod(x, np.uint64(low))
    for number in range(_ROUNDS):
        key = key + _ODD
        a = (a + mix(key ^ mix(b + np.uint64(2 * number)))) % np.uint64(high)
        key = key + _ODD
        b = (b + mix(key ^ mix(a + np.uint64(2 * number + 1)))) % np.uint64(low)
    return a * np.uint64(low) + b


def mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64: every bit of uint64 ``x`` changes about half of the result's."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
