"""Addressed random numbers: (seed, purpose, name, global index) -> value.

Nothing is drawn from a stream, so nothing depends on who asks first: a rank computes exactly the
values of its own slices, and every mesh sees the same model, the same dropout and the same order of
data.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from minillm import kernels

_BLOCK = 1 << 16  # elements made at once, so that index arrays stay small


def key(seed: int, purpose: str, name: str, *numbers: int) -> int:
    """A 64-bit key for a use of randomness: BLAKE2b of the seed, what it is for, and any further
    numbers such as the step."""
    text = "\0".join([str(seed), purpose, name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normal(
    key: int, shape: tuple[int, ...], slices: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Standard normal values of the block `slices` of a global array of `shape`; each depends on
    its global position only."""
    return _addressed(kernels.random_normal, key, shape, slices, dtype)


def uniform(
    key: int, shape: tuple[int, ...], slices: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Uniform values in (0, 1) of the block `slices` of a global array of `shape`."""
    return _addressed(kernels.random_uniform, key, shape, slices, dtype)


def _addressed(
    make: Any, key: int, shape: tuple[int, ...], slices: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    sizes = [part.stop - part.start for part in slices]
    out = np.empty(sizes, dtype)
    if not out.size:
        return out
    columns = (
        np.arange(slices[-1].start, slices[-1].stop, dtype=np.uint64)
        if shape
        else np.zeros(1, np.uint64)
    )
    rows = np.zeros(1, np.uint64)  # flat index of the first element of each row of the block
    for size, part in zip(shape[:-1], slices[:-1], strict=True):
        rows = (
            rows[:, None] * np.uint64(size) + np.arange(part.start, part.stop, dtype=np.uint64)
        ).reshape(-1)
    flat = out.reshape(len(rows), len(columns))
    step = max(1, _BLOCK // len(columns))
    for first in range(0, len(rows), step):
        index = rows[first : first + step, None] * np.uint64(shape[-1] if shape else 1) + columns
        flat[first : first + step] = make(key, index.reshape(-1)).reshape(index.shape)
    return out


def permute(key: int, n: int, indices: Any) -> np.ndarray:
    """Where a fixed random permutation of [0, n) sends `indices`, without storing it: a four-round
    Feistel network over the next power of four, walked until it lands below n (Black and Rogaway
    2002)."""
    x = np.array(indices, np.uint64, ndmin=1)
    half = max(1, (max(n - 1, 1).bit_length() + 1) // 2)
    low = np.uint64((1 << half) - 1)
    pending = np.arange(x.size)
    while pending.size:
        value = x[pending]
        left, right = value >> np.uint64(half), value & low
        for round_ in range(4):
            left, right = right, left ^ (kernels.random_bits(key + round_, right) & low)
        x[pending] = (left << np.uint64(half)) | right
        pending = pending[x[pending] >= n]
    return x.astype(np.int64)
