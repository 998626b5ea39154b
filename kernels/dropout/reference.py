"""Dropout (Srivastava et al. 2014) with addressed masks, one element at a time.

An element's fate is a function of (key, sample, time, channel), so any shard of any mesh makes its
own part of the mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.random.reference import random_bits

COLUMN_KEY = 0x5851F42D4C957F2D


def dropout_forward(
    x: Any, p: float, key: int, samples: Any, times: Any, channels: Any, out: Any = None
) -> Any:
    """x times a mask that is 0 with probability p, else 1 / (1 - p). Its own backward pass.

    x: [B, T, C].
    samples: [B], times: [T], channels: [C], integers: the global positions of x's elements.
    out: contiguous, takes the result; may be x itself.
    """
    mask = np.empty(x.shape, x.dtype)
    for b, sample in enumerate(samples):
        for t, time in enumerate(times):
            for c, channel in enumerate(channels):
                mask[b, t, c] = keeps(p, key, int(sample), int(time), int(channel)) / (1 - p)
    return np.multiply(x, mask, out=out)


def keeps(p: float, key: int, sample: int, time: int, channel: int) -> bool:
    """Tell if an element is kept: mix the words of its row and of its column in 32 bits."""
    row = random_bits(key, sample << 32 | time)
    column = random_bits(COLUMN_KEY, channel) >> 32
    z = ((row & 0xFFFFFFFF) ^ column) * 0x7FEB352D & 0xFFFFFFFF
    z = ((z ^ z >> 15) + (row >> 32) & 0xFFFFFFFF) * 0x846CA68B & 0xFFFFFFFF
    return z >= round(p * 2**32)
