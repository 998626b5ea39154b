"""Dropout of attention probabilities, addressed by sample, head, query time and key time."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.random.hashing import (
    address_words,
    column_words,
    keep,
    random_bits,
    row_words,
)

Array = Any


class AttentionDropout(NamedTuple):
    """Dropout of attention probabilities, addressed by global positions.

    The address is (key, sample, global head, query time, key time). `samples` [B], `times_q` [Tq]
    or [B, Tq] and `times_k` [Tk] or [B, Tk] are global, `head0` is the first global head of this
    shard. For kernels on a GPU the arrays may lie there; otherwise they are copied.
    """

    p: float
    key: int
    samples: Array
    head0: int
    times_q: Array
    times_k: Array

    def mask(self, b: int, h: int, queries: Any, keys: Any, dtype: Any) -> Array:
        """Return the scaled keep mask [queries, keys] of local head `h`.

        Its values are 0 with probability p, else 1 / (1 - p). `queries` and `keys` are slices or
        index arrays.
        """
        samples = np.asarray(self.samples)
        head_key = address_words(self.key, samples[b : b + 1], np.asarray([self.head0 + h]))
        times_q, times_k = (
            x if x.ndim == 1 else x[b] for x in map(np.asarray, (self.times_q, self.times_k))
        )
        rows = random_bits(int(head_key[0, 0]), times_q[queries].astype(np.uint64))
        return keep(self.p, rows, column_words(times_k[keys])) * dtype.type(1 / (1 - self.p))

    def masks(self, b: int, heads: slice, queries: Any, keys: Any, dtype: Any) -> Array:
        """Return the masks [heads, queries, keys] of several local heads, made at once."""
        samples, numbers = np.asarray(self.samples), np.arange(heads.start, heads.stop)
        head_keys = address_words(self.key, samples[b : b + 1], self.head0 + numbers)
        times_q, times_k = (
            x if x.ndim == 1 else x[b] for x in map(np.asarray, (self.times_q, self.times_k))
        )
        rows = row_words(head_keys, times_q[queries])[0]
        return keep(self.p, rows, column_words(times_k[keys])) * dtype.type(1 / (1 - self.p))
