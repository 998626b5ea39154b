"""Microbatches: the rows of a step, dealt to data-parallel ranks and cut one after another.

    turn      0    1    2  |  3    4         two microbatches, of three turns and of two
    rank 0   -1    1    3  |  5    7         9 rows over two ranks: a turn has a row for each rank,
    rank 1    0    2    4  |  6    8         but for the first, which gets what does not divide

Rows of unequal lengths are sorted. Dealt in turn, the ranks' shares differ by less than a row's
length, and each microbatch has rows of similar lengths.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minillm.base.arrays import IntArray


class Microbatches(NamedTuple):
    """Rows of a step by turns. Microbatch m has the turns ends[m] to ends[m + 1] of every rank."""

    grid: IntArray  # [turns, ranks]: row that each rank takes in a turn; -1: none
    ends: IntArray  # [M + 1]

    @property
    def number(self) -> int:
        """Microbatches of each rank."""
        return len(self.ends) - 1

    def rows(self, rank: int, microbatch: int) -> IntArray:
        """Return the rows of a microbatch on a rank, int64 [b]; empty where it gets none."""
        found = self.grid[self.ends[microbatch] : self.ends[microbatch + 1], rank]
        return found[found >= 0]


def in_blocks(batch: int, ranks: int, number: int) -> Microbatches:
    """Return the rows of a batch that `ranks` and `number` divide, each rank's next to another."""
    return _even(np.arange(batch).reshape(ranks, -1).T, number)


def in_turn(batch: int, ranks: int, number: int) -> Microbatches:
    """Return the rows of a batch that `ranks` and `number` divide, dealt in turn."""
    return _even(np.arange(batch).reshape(-1, ranks), number)


def _even(grid: IntArray, number: int) -> Microbatches:
    return Microbatches(grid, np.arange(number + 1) * (len(grid) // number))


def by_positions(sizes: IntArray, ranks: int, least: int, most: int) -> Microbatches:
    """Return the sorted rows of lengths `sizes` [n], dealt in turn, in parts of like many tokens.

    They are the fewest microbatches, but at least `least`, in which a rank computes at most `most`
    positions each, padding included; 0: no limit. A turn is never cut: each microbatch has a row.
    """
    turns = -(-len(sizes) // ranks)
    grid = np.maximum(np.arange(len(sizes) - turns * ranks, len(sizes)), -1).reshape(turns, ranks)
    each = np.where(grid < 0, 0, sizes[grid])
    longest, number = each.max(1), min(least, turns)
    while True:
        ends = even_cuts(each.sum(1), number)
        positions = np.diff(ends) * np.maximum.reduceat(longest, ends[:-1])
        if not most or number == turns or (positions <= most).all():
            return Microbatches(grid, ends)
        number += 1


def even_cuts(sizes: IntArray, number: int) -> IntArray:
    """Return where to cut items [n] into `number` parts of like sums, int64 [number + 1].

    The sum of a part differs from the mean by less than the largest of `sizes`, unless that would
    leave a part without an item: n >= number.
    """
    ends, inner = np.cumsum(sizes), np.arange(1, number)
    targets = int(ends[-1]) * inner // number
    after = np.searchsorted(ends, targets)  # the item that reaches the target
    before = ends[after] - np.asarray(sizes)[after]
    nearest = after + (ends[after] - targets < targets - before)
    nearest = np.clip(np.maximum.accumulate(nearest - inner), 0, len(sizes) - number) + inner
    return np.concatenate([[0], nearest, [len(sizes)]])


class Load(NamedTuple):
    """Positions of a step over all ranks."""

    real: int  # positions of sequences
    computed: int  # with the padding of every microbatch
    balance: float  # computed positions of the busiest rank, divided by the mean
    sequences: int = 0


def load_of(lengths: IntArray, cut: Microbatches, together: bool = False) -> Load:
    """Return the load of a step whose rows have `lengths` [n, K], for K parts of each.

    With `together` all parts of a microbatch are padded to one length.
    """
    held = cut.grid >= 0  # [turns, ranks]
    longest = np.maximum.reduceat(np.where(held[..., None], lengths[cut.grid], 1), cut.ends[:-1])
    counts = np.add.reduceat(held, cut.ends[:-1], dtype=np.int64)  # [M, ranks]
    longest = np.maximum(longest, 1)
    longest = longest.max(-1) * lengths.shape[1] if together else longest.sum(-1)
    own = (longest * counts).sum(0)
    balance = float(own.max() / max(own.mean(), 1))
    return Load(int(lengths.sum()), int(own.sum()), balance, len(lengths))
