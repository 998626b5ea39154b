"""Greedy translation with caches, over tensor-parallel ranks and stages.

The sources go through the encoder once, together with the first token of the targets. Each decoder
layer keeps the keys and values of its memory, and every further token costs one position.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from minillm.base.arrays import IntArray
from minillm.data.buckets import padded, padded_length
from minillm.inference.cache import cached_keys, new_cache
from minillm.inference.engine import Generator
from minillm.models.protocol import Batch
from minillm.params.where import KeyLimits, Where
from minillm.training.assembly import Assembly


class Translator(Generator):
    """Ranks of one dp coordinate that translate together. Collective over their tp and pp axes.

    `start`, `step` and `reorder` are what a search needs; `greedy` is the simplest one. `end` ends
    every sequence and begins every target.
    """

    def __init__(self, model: Assembly, end: int) -> None:
        super().__init__(model, end + 1)
        self.end = end

    def start(self, sources: Sequence[IntArray]) -> np.ndarray | None:
        """Encode sources [B], each with its end, and return the logits [B, V] of first tokens.

        They are None before the last stage, as those of `step`.
        """
        lengths = np.array([len(ids) for ids in sources], np.int64)
        self._cache = new_cache(self.models.values(), len(sources), self.device)
        self._length = 0
        size = int(padded_length(int(lengths.max()), self.context))
        return self._read(
            np.full(len(sources), self.end, np.int64),
            {"source": padded(sources, size, self.end)},
            KeyLimits(lengths=lengths),
        )

    def step(self, ids: IntArray) -> np.ndarray | None:
        """Append `ids` int64 [B] to the targets and return the logits [B, V] of the next tokens."""
        return self._read(ids, {}, None)

    def reorder(self, parents: IntArray) -> None:
        """Let row r continue the target of row parents[r], int64 [B'], equal on every rank."""
        for kept in self._cache.values():
            kept.reorder(parents)

    def _read(
        self, ids: IntArray, more: dict[str, IntArray], memory: KeyLimits | None
    ) -> np.ndarray | None:
        times = np.array([self._length])
        where = Where(0, np.arange(len(ids)), times, device=self.device)
        arrays = {"target": ids[:, None], **more}
        self._length += 1
        return self.run(
            Batch(
                {name: self.device.upload(array) for name, array in arrays.items()},
                {},
                where,
                cached_keys(times),
                self._cache,
                memory,
            )
        )

    def greedy(self, sources: Sequence[IntArray], most: int | None = None) -> list[list[int]]:
        """Return the likeliest token after token for each source, without the end.

        At most `most` tokens, and never more than the context holds. Equal logits choose the lower
        id. Equal on every rank.
        """
        found: list[list[int]] = [[] for _ in sources]
        running = np.ones(len(sources), bool)
        logits = self.start(sources)
        for _ in range(min(most or self.context, self.context - 1)):
            chosen = np.zeros(len(sources), np.int64)
            if logits is not None:
                chosen[:] = logits[:, : self.num_ids].argmax(-1)
            self.links.broadcast_(chosen, self._last_rank, kind="control")
            running &= chosen != self.end
            if not running.any():
                break
            for row in np.flatnonzero(running):
                found[row].append(int(chosen[row]))
            logits = self.step(chosen)
        return found
