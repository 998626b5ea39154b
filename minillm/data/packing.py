"""Packing: several short sequences in one row, each blind for the others.

Their keys are bounded by the start and the end of the own sequence (`KeyLimits`), never by an array
of T x T. Positions begin anew with every sequence. Loss and gradients are those of padded rows;
dropout differs, as it repeats where sequences of one row have the same position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minillm.base.arrays import IntArray
from minillm.params.where import KeyLimits


class Packing:
    """Places of sequences of `lengths` int64 [n] in rows of `capacity` positions.

    First fit, the longest first (Johnson 1973: at most 11/9 of the fewest rows, and one more). The
    positions behind a row's last sequence are one of their own.
    """

    def __init__(self, lengths: IntArray, capacity: int) -> None:
        assert not len(lengths) or max(lengths) <= capacity, "a sequence is longer than a row"
        self.lengths, self.capacity = np.asarray(lengths, np.int64), capacity
        self.rows, self.starts = np.zeros((2, len(lengths)), np.int64)
        """Row and first position of each sequence, int64 [n]."""
        used: list[int] = []
        for each in np.argsort(-self.lengths, kind="stable"):
            length = int(self.lengths[each])
            row = next((r for r, n in enumerate(used) if n + length <= capacity), len(used))
            if row == len(used):
                used.append(0)
            self.rows[each], self.starts[each] = row, used[row]
            used[row] += length
        self._used = np.array(used, np.int64)

    def fill(self, sequences: Sequence[IntArray], behind: int) -> IntArray:
        """Return the rows int64 [R, capacity] of `sequences` of these lengths, `behind` them."""
        out = np.full((len(self._used), self.capacity), behind, np.int64)
        for row, start, sequence in zip(self.rows, self.starts, sequences, strict=True):
            out[row, start : start + len(sequence)] = sequence
        return out

    def times(self) -> IntArray:
        """Return the position of every element in its own sequence, int64 [R, capacity]."""
        return np.arange(self.capacity) - self._bounds()[0]

    def limits(self) -> KeyLimits:
        """Return the bounds on the keys of every query: those of its own sequence."""
        first, last = self._bounds()
        return KeyLimits(first_time=first, last_time=last)

    def _bounds(self) -> tuple[IntArray, IntArray]:
        """Return the first and the last place of the sequence of each element."""
        shape = (len(self._used), self.capacity)
        first = np.broadcast_to(self._used[:, None], shape).copy()
        last = np.full(shape, self.capacity - 1)
        for row, start, length in zip(self.rows, self.starts, self.lengths, strict=True):
            first[row, start : start + length] = start
            last[row, start : start + length] = start + length - 1
        return first, last
