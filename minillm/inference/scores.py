"""Scores of the next tokens, cut over tensor-parallel ranks by ids.

No rank gathers the scores of the whole vocabulary. A choice needs the best few of each rank, or one
number a row: the all-gathers here move `count` pairs (value, id), or two numbers, a row and rank.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from minillm.base.arrays import IntArray
from minillm.comm.communicator import Communicator
from minillm.comm.single import SelfCommunicator

ALONE = SelfCommunicator("choice")
NO_ID = 1 << 52  # stands for no token, with the score -inf; float64 holds it exactly


class Scores(NamedTuple):
    """Scores of the next token of each row, -inf for a token that must not be chosen.

    The methods are collective over `comm`, and return the same on each of its ranks.
    """

    values: np.ndarray  # [B, C] float64: of the ids that this rank holds
    ids: IntArray  # int64 [B, C]
    comm: Communicator  # of the ranks that hold the other ids

    def top(self, count: int) -> Scores:
        """Return the `count` best of each row, [B, count] on every rank, the best first.

        The lower id comes first among equal ones. Where there are fewer, `NO_ID` fills up.
        """
        num_rows = len(self.values)
        values, ids = np.full((num_rows, count), -np.inf), np.full((num_rows, count), NO_ID)
        for row in range(num_rows):
            best = _best(self.values[row], self.ids[row], count)
            values[row, : len(best)] = self.values[row, best]
            ids[row, : len(best)] = self.ids[row, best]
        if self.comm.size > 1:
            pairs = self.comm.all_gather(np.stack([values, ids], -1), dim=1)  # [B, tp count, 2]
            values, ids = pairs[..., 0], pairs[..., 1].astype(np.int64)
            order = np.lexsort((ids, -values))[:, :count]
            values, ids = (np.take_along_axis(each, order, 1) for each in (values, ids))
        return Scores(values, ids, ALONE)

    def log_sum_exp(self) -> np.ndarray:
        """Return the logarithm of the sum of exponentials over all ids, float64 [B]."""
        most = self.values.max(-1, initial=-1e300)  # finite where a rank has no token left
        sums = np.exp(self.values - most[:, None]).sum(-1)
        pairs = self.comm.all_gather(np.stack([most, sums], -1)[:, None], dim=1)  # [B, tp, 2]
        whole = pairs[..., 0].max(1)
        return whole + np.log((pairs[..., 1] * np.exp(pairs[..., 0] - whole[:, None])).sum(1))


def _best(values: np.ndarray, ids: IntArray, count: int) -> IntArray:
    """Return where the `count` best of `values` [C] stand, the best first."""
    if count == 1:
        return np.array([values.argmax()] if len(values) else [], np.int64)  # the first of equals
    best = np.arange(len(values))
    if count < len(values):
        least = np.partition(values, -count)[-count]
        best = np.flatnonzero(values >= least)  # all that equal the last one, too
    return best[np.lexsort((ids[best], -values[best]))[:count]]
