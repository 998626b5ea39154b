"""Who sees what in attention: blocks of queries with the keys they can see, and dropout of
probabilities."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.random.hashing import address_words, column_words, keep
from minillm.kernels.random.reference import random_bits

Array = Any

# a block: large enough for full-speed products, small enough to leave out most of what a causal
# mask hides
QUERY_ROWS = 128


class QueryBlock(NamedTuple):
    """Some queries, the keys [0, stop) that any of them sees, those [0, clear) that all of them
    see, and what is hidden in between."""

    rows: slice
    size: int
    stop: int
    clear: int
    hidden: (
        Array | None
    )  # [size, stop - clear]: 0 where seen, minus infinity where hidden; None if nothing is hidden


def query_blocks(
    Tq: int, Tk: int, causal: bool, times_q: Array | None, times_k: Array | None, dtype: Any
) -> list[QueryBlock]:
    """Cut Tq queries into blocks. Causal: query i sees key j if times_q[i] >= times_k[j], in any
    order; times default to the indices."""
    parts = [slice(start, min(start + QUERY_ROWS, Tq)) for start in range(0, Tq, QUERY_ROWS)]
    if not causal:
        return [QueryBlock(rows, rows.stop - rows.start, Tk, Tk, None) for rows in parts]
    times_q = np.arange(Tq) if times_q is None else np.asarray(times_q)
    times_k = np.arange(Tk) if times_k is None else np.asarray(times_k)
    return [_causal_block(rows, times_q[rows], times_k, dtype) for rows in parts]


def _causal_block(rows: slice, times_q: Array, times_k: Array, dtype: Any) -> QueryBlock:
    seen_by_one = np.flatnonzero(times_k <= times_q.max())
    stop = int(seen_by_one[-1]) + 1 if len(seen_by_one) else 0
    hidden_from_one = np.flatnonzero(times_k[:stop] > times_q.min())
    if not len(hidden_from_one):
        return QueryBlock(rows, len(times_q), stop, stop, None)
    clear = int(hidden_from_one[0])
    hidden = np.where(times_k[clear:stop] > times_q[:, None], dtype.type(-np.inf), dtype.type(0))
    return QueryBlock(rows, len(times_q), stop, clear, hidden)


class AttentionDropout(NamedTuple):
    """Dropout of attention probabilities, addressed by (key, sample, global head, query time, key
    time).

    `samples` [B], `times_q` [Tq] and `times_k` [Tk] are global positions, `head0` is the first
    global head of this shard. For kernels on a GPU the arrays may lie there, and cost a copy if
    they do not.
    """

    p: float
    key: int
    samples: Array
    head0: int
    times_q: Array
    times_k: Array

    def mask(self, b: int, h: int, queries: slice, num_keys: int, dtype: Any) -> Array:
        """The scaled keep mask [queries, num_keys] of local head `h`: 0 with probability p, else 1
        / (1 - p)."""
        head_key = address_words(
            self.key, np.asarray(self.samples)[b : b + 1], np.asarray([self.head0 + h])
        )
        rows = random_bits(int(head_key[0, 0]), np.asarray(self.times_q)[queries].astype(np.uint64))
        return keep(self.p, rows, column_words(np.asarray(self.times_k)[:num_keys])) * dtype.type(
            1 / (1 - self.p)
        )
