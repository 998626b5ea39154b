"""Consecutive windows of a text: row b of a step continues row b of the step before.

An epoch cuts the text into `batch` streams of equal length, and each stream into windows of
`context` tokens that follow one another. Step by step, every row goes on in its own stream:

    tokens   |..offset..|-- stream 0: w0 w1 w2 ... --|-- stream 1: w0 w1 ... --| ... |..rest..|

The offset changes every epoch, and with it the cuts. All is a function of seed and step alone.
Invariant: offset + rest < batch * context.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minillm.base import rng
from minillm.base.errors import ConfigError
from minillm.data.batches import Batches


class Streams(Batches):
    """Training batches of `batch` streams, each `context` tokens further in every step.

    `tokens`: [N], any integer dtype, in memory or mapped. `first`: number of the sequence in
    row 0 of step 0, negative if the run began with other data.
    """

    def __init__(
        self, tokens: np.ndarray, context: int, batch: int, seed: int, first: int = 0
    ) -> None:
        """Raise ConfigError if N < batch * context + 1 or a size is not positive."""
        super().__init__(tokens, context, batch, seed, first)
        if len(tokens) < batch * context + 1:
            most = (len(tokens) - 1) // context
            raise ConfigError(
                f"{len(tokens)} tokens are too few for {batch} streams with a window of {context} "
                f"each and a last target; use --batch {most} or less, or a smaller --context"
            )
        self.num_windows = (len(tokens) - 1) // (batch * context)
        """Windows of a stream, the steps of an epoch."""
        self.num_sequences = self.num_windows * batch
        self._num_offsets = len(tokens) - self.num_sequences * context

    def starts(self, step: int, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the corpus positions at which the rows of a step begin, int64 [b].

        Raises IndexError for rows outside [0, batch).
        """
        rows = np.asarray(rows, np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.batch):
            raise IndexError(f"rows {rows.min()} to {rows.max()} do not lie in {self.batch} rows")
        epoch, window = self._place(step)
        return self.offset(epoch) + (rows * self.num_windows + window) * self.context

    def continues(self, step: int) -> bool:
        """Return whether the rows of `step` continue those of the step before."""
        return self._place(step)[1] > 0

    def _place(self, step: int) -> tuple[int, int]:
        """Return epoch and window of a step. A run with another batch before begins a stream."""
        return divmod(step + self.first // self.batch, self.num_windows)

    def offset(self, epoch: int) -> int:
        """Return the position of the first stream of `epoch`."""
        return int(rng.key(self.seed, "data", "stream", epoch) % self._num_offsets)
