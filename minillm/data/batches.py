"""Which tokens a step trains on: a function of (seed, step, row) and of nothing else.

The global batch is fixed: row r of step s is sequence number s * batch + r, whatever the mesh, the
microbatch size or the rank that asks. Nothing depends on the steps before, so resuming needs no
state, and a rank reads its own rows only.

An epoch cuts the corpus into windows of `context` tokens that do not overlap, and visits them in
the order of a stateless permutation. The first window starts at an offset in [0, context) that
changes from epoch to epoch, so that the cuts (and with them what a token can look back on) vary:

    tokens   |..offset..|-- window 0 --|-- window 1 --| ... |-- window n-1 --|..rest..|

Invariant: offset + rest < 2 * context.

Inputs are tokens[start : start + context]; targets are the same, one further on, so neighbouring
windows share one token and every target is seen once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minillm.base import rng
from minillm.base.errors import ConfigError

_BLOCK = 1024  # sequences whose order is worked out at once
IGNORE_INDEX = -100  # the target that the loss does not count


class Batches:
    """Training sequences of `context` tokens from `tokens` [N], `batch` of them a step, in an order
    that depends on `seed`."""

    def __init__(self, tokens: np.ndarray, context: int, batch: int, seed: int) -> None:
        """Raises ConfigError if `tokens` has no room for one sequence and its last target, or a
        size is not positive."""
        if context < 1 or batch < 1:
            raise ConfigError(f"context {context} and batch {batch} must be at least 1")
        if len(tokens) < context + 1:
            raise ConfigError(
                f"{len(tokens)} tokens are too few for a sequence of {context} and its last "
                "target; use --context "
                f"{max(1, len(tokens) - 1)} or less"
            )
        self.tokens = np.asarray(tokens)
        self._windows = np.lib.stride_tricks.sliding_window_view(
            self.tokens, context + 1
        )  # [N - T, T + 1]: one from every position
        self.context = context
        self.batch = batch
        self.seed = seed
        self.num_sequences = max(1, (len(tokens) - context) // context)
        """Windows in an epoch: as many as fit behind the largest offset."""
        self._num_offsets = min(context, len(tokens) - self.num_sequences * context)

    def starts(self, step: int, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Where in the corpus the sequences in `rows` [b] (0 to batch - 1) of `step` (from 0)
        begin: int64 [b]. Raises IndexError for another row."""
        rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
        if rows and not (min(rows) >= 0 and max(rows) < self.batch):
            raise IndexError(
                f"rows {min(rows)} to {max(rows)} do not lie in a batch of {self.batch}"
            )
        first = step * self.batch
        return np.array([self._start(first + row) for row in rows], np.int64)

    def _start(self, number: int) -> int:
        """Where sequence `number` of the run begins."""
        epoch, index = divmod(number, self.num_sequences)
        block, place = divmod(index, _BLOCK)
        return self._block(epoch, block)[place]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (a run has one or two of these, for all its time)
    def _block(self, epoch: int, number: int) -> list[int]:
        """Where the windows begin that stand at `number` * _BLOCK and behind in the epoch's order.
        Made by the block, since a permutation costs much for the first index and little for the
        next thousand."""
        indices = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.num_sequences))
        windows = rng.permute(
            rng.key(self.seed, "data", "order", epoch), self.num_sequences, indices
        )
        return (self.offset(epoch) + windows * self.context).tolist()

    def offset(self, epoch: int) -> int:
        """Where the first window of `epoch` starts."""
        return int(rng.key(self.seed, "data", "offset", epoch) % self._num_offsets)

    def microbatch(
        self, step: int, rows: np.ndarray | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [b, context] each, of the given rows [b] of `step`: the same on
        any mesh."""
        both = self._windows[
            self.starts(step, rows)
        ]  # [b, T + 1]; of a mapped file only those pages are touched
        return both[:, :-1].astype(np.int64, order="C"), both[:, 1:].astype(np.int64, order="C")

    def epoch(self, step: int) -> float:
        """How often the corpus has been gone through before `step`."""
        return step * self.batch / self.num_sequences


class EvalWindows:
    """Held-out tokens as windows of `context`, every one but the first of them a target exactly
    once; see `eval_windows`."""

    def __init__(self, tokens: np.ndarray, context: int, num_tokens: int) -> None:
        self.tokens = np.asarray(tokens)
        self.context = context
        self.num_tokens = num_tokens
        """How many targets there are: the divisor of the mean loss."""
        self.num_windows = -(-num_tokens // context)

    def microbatch(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, int64 [b, context] each, of the windows `rows` [b] (0 to num_windows
        - 1).

        The last window may be short: behind its end inputs are 0 and targets IGNORE_INDEX. Raises
        IndexError for a row that is no window.
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.num_windows):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} do not lie in {self.num_windows} evaluation "
                "windows"
            )
        at = rows[:, None] * self.context + np.arange(
            self.context
        )  # [b, T]: the position of each input
        counted = at < self.num_tokens
        at = np.minimum(at, self.num_tokens - 1)
        inputs = np.where(counted, self.tokens[at].astype(np.int64), 0)
        return inputs, np.where(counted, self.tokens[at + 1].astype(np.int64), IGNORE_INDEX)

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Rows 0 to num_windows - 1 in order, `batch` at a time: int64 [batch], fewer in the
        last."""
        for start in range(0, self.num_windows, batch):
            yield np.arange(start, min(start + batch, self.num_windows))


def eval_windows(tokens: np.ndarray, context: int, max_tokens: int | None = None) -> EvalWindows:
    """Windows that cover the first `max_tokens` targets of `tokens` [M] (all M - 1 by default), in
    order, without overlap and without chance.

    Raises ConfigError if there is nothing to predict.
    """
    if context < 1 or (max_tokens is not None and max_tokens < 1):
        raise ConfigError(
            f"context {context} and the number of evaluation tokens {max_tokens} must be at least 1"
        )
    if len(tokens) < 2:
        raise ConfigError(
            f"{len(tokens)} held-out tokens leave nothing to predict; hold out a larger part of "
            "the corpus"
        )
    return EvalWindows(tokens, context, min(len(tokens) - 1, max_tokens or len(tokens)))
