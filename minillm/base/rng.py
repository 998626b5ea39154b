"""Counter-based random numbers: a value is a function of (seed, purpose, name, global index).

There is no stream, so no order of calls. A rank computes the values of its own slices, and every
mesh sees the same model, the same dropout and the same order of data.
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np

from minillm import kernels

_BLOCK = 1 << 16  # elements computed at once, so that index arrays stay small


def key(seed: int, purpose: str, name: str, *numbers: int) -> int:
    """Return a 64-bit key: BLAKE2b of the seed, the purpose, the name and further numbers.

    The further numbers are the step or the epoch.
    """
    text = "\0".join([str(seed), purpose, name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def normal(
    key: int, shape: tuple[int, ...], slices: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Return the block `slices` of a global array of `shape` of standard normal values.

    Each value depends on its global position only.
    """
    return _addressed(kernels.random_normal, key, shape, slices, dtype)


def uniform(
    key: int, shape: tuple[int, ...], slices: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Return the block `slices` of a global array of `shape` of uniform values in (0, 1)."""
    return _addressed(kernels.random_uniform, key, shape, slices, dtype)


def uniform_at(key: int, indices: np.ndarray) -> np.ndarray:
    """Return uniform values in (0, 1), float64, at any `indices` of the key, of their shape."""
    return kernels.random_uniform(key, indices)


def _addressed(
    make: Any, key: int, shape: tuple[int, ...], slices: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    sizes = [part.stop - part.start for part in slices]
    out = np.empty(sizes, dtype)
    if not out.size:
        return out
    # Flat indices within each dim; a scalar is the only element of [1].
    dims = [np.arange(part.start, part.stop, dtype=np.uint64) for part in slices or (slice(0, 1),)]
    columns = dims[-1]
    rows = np.zeros(1, np.uint64)  # flat index of the first element of each row of the block
    for size, indices in zip(shape[:-1], dims[:-1], strict=True):
        rows = (rows[:, None] * np.uint64(size) + indices).reshape(-1)
    flat = out.reshape(len(rows), len(columns))
    step = max(1, _BLOCK // len(columns))
    for first in range(0, len(rows), step):
        index = rows[first : first + step, None] * np.uint64(shape[-1] if shape else 1) + columns
        flat[first : first + step] = make(key, index.reshape(-1)).reshape(index.shape)
    return out


def permute(key: int, n: int, indices: Any) -> np.ndarray:
    """Return a fixed random permutation of [0, n) at `indices`, int64, without storing it.

    A four-round Feistel network permutes the next power of four. Cycle walking repeats it until the
    value is below n (Black and Rogaway 2002).
    """
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
