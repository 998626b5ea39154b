"""Batches by tokens: sequences of unequal lengths, in batches of like many tokens.

    epoch's random order    cut into windows of about 50 batches
    inside a window         sorted by length, every other window from long to short
    the whole epoch         cut into batches of like many tokens, whose order is random
    inside a batch          sorted again; data-parallel rank r of n takes rows[r::n]

An epoch is a whole number of steps, in which each sequence comes once. Its batches are equally
many in every epoch. A batch is a function of the seed and the step, so it is the same on every
mesh. A long sequence fills as much of a batch as several short ones, so a step has the same work,
where batches of equally many sequences differ by several times.
"""

from __future__ import annotations

import functools

import numpy as np

from minillm.base import rng
from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.data.buckets import WINDOW, Buckets, by_length
from minillm.data.microbatches import even_cuts


class TokenBatches:
    """Order of sequences in batches of about `tokens` tokens; of K parts the longest counts.

    `lengths`: int64 [N] or [N, K]. Batch 0 has the sequence number `first`, the number of sequences
    before step `step`: the next batch from there on follows. Without `shuffle` the sequences keep
    their order.
    """

    def __init__(
        self,
        lengths: IntArray,
        tokens: int,
        seed: int = 0,
        *,
        shuffle: bool = True,
        first: int = 0,
        step: int = 0,
        window: int = WINDOW,
    ) -> None:
        """Raise ConfigError without a sequence, and for one that is longer than a batch."""
        if not len(lengths):
            raise ConfigError("there is no sequence to learn from")
        self.lengths = np.asarray(lengths, np.int64).reshape(len(lengths), -1)  # [N, K]
        self.sizes = self.lengths.max(1)
        self.tokens, self.seed, self.shuffle, self.window = tokens, seed, shuffle, window
        if (longest := int(self.sizes.max())) > tokens:
            raise ConfigError(
                f"--batch-tokens {tokens} is less than the {longest} tokens of the longest "
                f"sequence; use {longest} or more, or a smaller --context"
            )
        self.number = -(-int(self.sizes.sum()) // tokens)
        """Batches of an epoch."""
        epoch, read = divmod(first, len(self.lengths))
        index = int(np.searchsorted(self._epoch(epoch)[1], read)) if read else 0
        self._ahead = epoch * self.number + index - step

    def rows(self, step: int) -> IntArray:
        """Return the sequences of a step by length, int64 [n]."""
        epoch, index = divmod(step + self._ahead, self.number)
        order, starts = self._epoch(epoch)
        return by_length(order[starts[index] : starts[index + 1]], self.lengths)

    def row_lengths(self, rows: IntArray) -> IntArray:
        """Return the lengths [n, K] of sequences [n]."""
        return self.lengths[rows]

    def position(self, step: int) -> int:
        """Return the number of sequences before a step, of all epochs."""
        epoch, index = divmod(step + self._ahead, self.number)
        return epoch * len(self.lengths) + int(self._epoch(epoch)[1][index])

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one object, alive for the whole run)
    def _epoch(self, epoch: int) -> tuple[IntArray, IntArray]:
        """Return the sequences of an epoch [N] in their order, and where its batches begin."""
        size, number = len(self.lengths), self.number
        items = np.arange(size)
        if not self.shuffle:
            return items, even_cuts(self.sizes, number)
        items = rng.permute(rng.key(self.seed, "data", "order", epoch), size, items)
        windows = np.array_split(items, max(1, round(number / self.window)))
        # Windows meet where both are long, or short: a batch across them is of one kind too.
        turns = [
            by_length(part, self.lengths)[:: 1 - 2 * (i % 2)] for i, part in enumerate(windows)
        ]
        items = np.concatenate(turns)
        ends = even_cuts(self.sizes[items], number)
        key = rng.key(self.seed, "data", "batches", epoch)
        parts = np.split(items, ends[1:-1])
        chosen = [parts[i] for i in rng.permute(key, number, np.arange(number))]
        return np.concatenate(chosen), np.cumsum([0, *map(len, chosen)])


def order_of(
    lengths: IntArray, batch: int | TokenBatches, seed: int, first: int
) -> Buckets | TokenBatches:
    """Return the order of sequences in batches of `batch`, or those by tokens themselves."""
    if isinstance(batch, TokenBatches):
        return batch
    return Buckets(lengths, batch, seed, first=first)
