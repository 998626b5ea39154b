"""Addressed random numbers in Python's integers.

A value is a function of a 64-bit key and a 64-bit index, so any rank can make any part of an array.
"""

from __future__ import annotations

from typing import Any

import numpy as np

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 2**64 - 1


def random_bits(key: int, index: int) -> int:
    """64 random bits: splitmix64's finaliser (Steele, Lea and Flood 2014) over index and key."""
    z = index * _GOLDEN + key & _WORD
    for more in (0, _GOLDEN):  # twice
        z = z + more & _WORD
        z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & _WORD
        z = (z ^ z >> 27) * 0x94D049BB133111EB & _WORD
        z ^= z >> 31
    return z


def random_uniform(key: int, index: int) -> float:
    """Uniform number in (0, 1): the top 52 bits plus a half, so never 0 or 1."""
    return ((random_bits(key, index) >> 12) + 0.5) * 2.0**-52


def random_normal(key: int, indices: Any) -> Any:
    """Return a standard normal float64 for each index [n], of the same bits on every machine.

    The inverse of the normal distribution function (AS 241, Wichura 1988) at `random_uniform`.
    """
    from statistics import NormalDist  # here, since it costs every start 10 ms

    inverse = NormalDist().inv_cdf
    return np.array([inverse(random_uniform(key, int(i))) for i in indices], np.float64)
