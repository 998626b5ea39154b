"""Sampling of training and evaluation batches: stateless, a function of (seed, step, row).

Row r of step s is sequence number first + s * batch + r, on any mesh and for any microbatch size.
`first` is 0 until a resumed run changes its batch or its data. No step depends on earlier steps, so
resuming needs no other state. A rank reads only its own rows.

An epoch cuts the corpus into disjoint windows of `context` tokens and visits them in the order of
a stateless permutation. The first window starts at an offset in [0, context) that changes every
epoch. So the cuts vary, and with them the context that a token sees:

    tokens   |..offset..|-- window 0 --|-- window 1 --| ... |-- window n-1 --|..rest..|

Invariant: offset + rest < 2 * context.

Inputs are tokens[start : start + context]. Targets are shifted by one, so neighbouring windows
share one token and every target is seen once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from minillm.base import rng
from minillm.base.errors import ConfigError
from minillm.data.token_files import length_check

_BLOCK = 1024  # sequences permuted at once
IGNORE_INDEX = -100  # target that the loss ignores


class Batches:
    """Training batches: `batch` sequences of `context` tokens per step, shuffled by `seed`.

    `tokens`: [N], any integer dtype, in memory or mapped. `first`: number of the sequence in
    row 0 of step 0, negative if the run began with other data.
    """

    def __init__(
        self, tokens: np.ndarray, context: int, batch: int, seed: int, first: int = 0
    ) -> None:
        """Raise ConfigError if N < context + 1 or a size is not positive."""
        if context < 1 or batch < 1:
            raise ConfigError(f"context {context} and batch {batch} must be at least 1")
        if len(tokens) < context + 1:
            raise ConfigError(
                f"{len(tokens)} tokens are too few for a sequence of {context} and its last "
                f"target; use --context {max(1, len(tokens) - 1)} or less"
            )
        self.tokens = np.asarray(tokens)
        self._check_length = length_check(tokens)
        # [N - T, T + 1]: a view from every position.
        self._windows = np.lib.stride_tricks.sliding_window_view(self.tokens, context + 1)
        self.context = context
        self.batch = batch
        self.seed = seed
        self.first = first
        self.num_sequences = max(1, (len(tokens) - context) // context)
        """Windows in an epoch: as many as fit after the largest offset."""
        self._num_offsets = min(context, len(tokens) - self.num_sequences * context)

    def starts(self, step: int, rows: np.ndarray | Sequence[int]) -> np.ndarray:
        """Return the corpus positions at which the sequences of a step begin, int64 [b].

        `rows` [b] lie in [0, batch), `step` counts from 0. Raises IndexError for any other row.
        """
        rows = rows.tolist() if isinstance(rows, np.ndarray) else rows
        if rows and not (min(rows) >= 0 and max(rows) < self.batch):
            raise IndexError(
                f"rows {min(rows)} to {max(rows)} do not lie in a batch of {self.batch}"
            )
        first = self.position(step)
        return np.array([self._start(first + row) for row in rows], np.int64)

    def position(self, step: int) -> int:
        """Return the number of sequences read before `step`."""
        return self.first + step * self.batch

    def _start(self, number: int) -> int:
        """Return the corpus position at which sequence `number` of the run begins."""
        epoch, index = divmod(number, self.num_sequences)
        block, place = divmod(index, _BLOCK)
        return self._block(epoch, block)[place]

    @functools.lru_cache(maxsize=2)  # noqa: B019 (one or two objects, alive for the whole run)
    def _block(self, epoch: int, number: int) -> list[int]:
        """Return the start positions of windows [number * _BLOCK, ...) in this epoch's order.

        Cached by block: the first index of a permutation is costly, the next thousand are nearly
        free.
        """
        indices = np.arange(number * _BLOCK, min((number + 1) * _BLOCK, self.num_sequences))
        windows = rng.permute(
            rng.key(self.seed, "data", "order", epoch), self.num_sequences, indices
        )
        return (self.offset(epoch) + windows * self.context).tolist()

    def offset(self, epoch: int) -> int:
        """Return the position of the first window of `epoch`."""
        return int(rng.key(self.seed, "data", "offset", epoch) % self._num_offsets)

    def microbatch(
        self, step: int, rows: np.ndarray | Sequence[int]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, int64 [b, context] each, of `rows` [b] of `step`.

        They do not depend on the mesh. Raises IndexError for a row outside [0, batch).
        """
        if self._check_length is not None:
            self._check_length()
        # [b, T + 1]; a mapped file pages in only these windows.
        both = self._windows[self.starts(step, rows)]
        return both[:, :-1].astype(np.int64, order="C"), both[:, 1:].astype(np.int64, order="C")

    def epoch(self, step: int) -> float:
        """Return the number of passes over the corpus completed before `step`."""
        return self.position(step) / self.num_sequences


class EvalWindows:
    """Evaluation windows: `num_tokens` consecutive targets, each in exactly one window.

    Made by `eval_windows`.
    """

    def __init__(self, tokens: np.ndarray, context: int, num_tokens: int) -> None:
        self.tokens = np.asarray(tokens)
        self._check_length = length_check(tokens)
        self.context = context
        self.num_tokens = num_tokens
        """Number of targets: the divisor of the mean loss."""
        self.num_windows = -(-num_tokens // context)

    def microbatch(self, rows: Any) -> tuple[np.ndarray, np.ndarray]:
        """Return inputs and targets, int64 [b, context] each, of the windows `rows` [b].

        The last window may be short: after its end inputs are 0 and targets IGNORE_INDEX. Raises
        IndexError for a row outside [0, num_windows).
        """
        rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        if rows.size and not (rows.min() >= 0 and rows.max() < self.num_windows):
            raise IndexError(
                f"rows {rows.min()} to {rows.max()} do not lie in {self.num_windows} evaluation "
                "windows"
            )
        if self._check_length is not None:
            self._check_length()
        at = rows[:, None] * self.context + np.arange(self.context)  # [b, T]: input positions
        counted = at < self.num_tokens
        at = np.minimum(at, self.num_tokens - 1)
        inputs = np.where(counted, self.tokens[at].astype(np.int64), 0)
        return inputs, np.where(counted, self.tokens[at + 1].astype(np.int64), IGNORE_INDEX)

    def batches(self, batch: int) -> Iterator[np.ndarray]:
        """Yield the rows 0 to num_windows - 1 in order, int64 [batch], fewer in the last array."""
        for start in range(0, self.num_windows, batch):
            yield np.arange(start, min(start + batch, self.num_windows))


def eval_windows(tokens: np.ndarray, context: int, max_tokens: int | None = None) -> EvalWindows:
    """Cut held-out tokens [M] into disjoint windows over the first `max_tokens` targets.

    The default is all M - 1 targets. The order is that of the text. Raises ConfigError if there is
    nothing to predict.
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
