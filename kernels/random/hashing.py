"""Dropout decisions for a grid of addresses, by hashing.

Row words and column words are hashed once. A few 32-bit steps mix each pair. A 64-bit hash for
every element would cost several times as much as the rest of dropout, because processors vectorise
32-bit multiplications.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = Any

COLUMN_KEY = 0x5851F42D4C957F2D
_MIX_1, _MIX_2 = (
    np.uint32(0x7FEB352D),
    np.uint32(0x846CA68B),
)  # the multipliers of Wellons' lowbias32
_GOLDEN = 0x9E3779B97F4A7C15


def _finalise_(z: Any) -> Any:
    z ^= z >> np.uint64(30)
    z *= np.uint64(0xBF58476D1CE4E5B9)
    z ^= z >> np.uint64(27)
    z *= np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return z


def random_bits(key: int, indices: Any) -> Any:
    """64 random bits (uint64) for each uint64 index, of the same shape."""
    z = np.array(indices, np.uint64, ndmin=1)
    z *= np.uint64(_GOLDEN)
    z += np.uint64(key & 0xFFFFFFFFFFFFFFFF)
    return _mix_(z).reshape(np.shape(indices))


def _mix_(z: Any) -> Any:
    _finalise_(z)
    z += np.uint64(_GOLDEN)
    return _finalise_(z)


def random_uniform(key: int, indices: Any) -> Any:
    """Uniform float64 in (0, 1) for each index: the top 52 bits plus a half, never 0 or 1."""
    return ((random_bits(key, indices) >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def address_words(key: int, outer: Array, inner: Array) -> Array:
    """Return 64 random bits for each pair of outer [A] and inner [B], uint64 [A, B].

    Both are integers in [0, 2^32).
    """
    index = (np.asarray(outer).astype(np.uint64) << np.uint64(32))[:, None] | np.asarray(
        inner
    ).astype(np.uint64)
    return random_bits(key, index)


def column_words(columns: Array) -> Array:
    """Return a random word for each column address [C] (integers from 0), uint32 [C]."""
    return (random_bits(COLUMN_KEY, np.asarray(columns).astype(np.uint64)) >> np.uint64(32)).astype(
        np.uint32
    )


def keep(p: float, rows: Array, columns: Array) -> Array:
    """Return the keep mask, bool [..., R, C], true with probability 1 - p.

    `rows`: row words uint64 [..., R]; `columns`: column words uint32 [C]. Element (r, c) depends on
    rows[r] and columns[c] only. p counts in steps of 2^-32. Two rows differ in how they mix, not
    only in where they start, so no two rows of a run share a pattern.
    """
    low, high = rows.astype(np.uint32), (rows >> np.uint64(32)).astype(np.uint32)
    z = low[..., None] ^ columns
    z *= _MIX_1
    z ^= z >> np.uint32(15)
    z += high[..., None]
    z *= _MIX_2
    return z >= np.uint32(threshold(p))


def threshold(p: float) -> int:
    """Return the 32-bit threshold of the mixture below which an element is dropped."""
    return min(round(p * 2**32), 2**32 - 1)


def row_words(head_keys: Array, times: Array) -> Array:
    """64 random bits for each query of each head, keyed by the heads' words.

    head_keys: uint64 [B, H]; times: int [Tq] or [B, Tq]. Returns uint64 [B, H, Tq].
    """
    index = np.atleast_2d(times).astype(np.uint64)[:, None] * np.uint64(_GOLDEN)
    return _mix_(index + head_keys[..., None])
