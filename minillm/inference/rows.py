"""Rows of a batch that a model reads on, each with a length of its own."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from minillm.base.arrays import IntArray
from minillm.inference.cache import Cache
from minillm.inference.engine import Generator
from minillm.inference.scores import Scores
from minillm.models.protocol import Batch

MOST_POSITIONS = 8192  # read at once, as far as rows allow: their activations are short of memory


class Rows:
    """Texts of a batch and the cache of what a model has read of them.

    One mechanism reads prompts, single tokens, turns of a chat, and texts that outgrow the context:
    `scores` reads what is new in each row. Rows with equally many new ids go through the model
    together, so nothing is padded. A row that has outgrown the context is read again from its last
    half.
    """

    def __init__(self, generator: Generator, texts: Sequence[Sequence[int]]) -> None:
        self.generator = generator
        self.texts = [list(text) for text in texts]
        self._starts = np.zeros(len(texts), np.int64)  # index of a text's first cached position
        self._read = np.zeros(len(texts), np.int64)  # cached positions
        self._cache = generator.new_cache(len(texts))

    def scores(self) -> Scores | None:
        """Read what is new, and return the scores of the next token of each row.

        They are None before the last stage. Collective over tp and pp.
        """
        lengths = np.array([len(text) for text in self.texts])
        for row in np.flatnonzero(lengths - self._starts > self.generator.context):
            self._starts[row] = lengths[row] - self.generator.reads(int(lengths[row]))
            self._read[row] = 0
        new = lengths - self._starts - self._read
        parts = [
            (rows, self._scores(rows, int(count)))
            for count in np.unique(new)
            for rows in _cut(np.flatnonzero(new == count), MOST_POSITIONS // count + 1)
        ]
        self._read += new
        found = [scores for _, scores in parts if scores is not None]
        if len(parts) == 1 or not found:
            return found[0] if found else None
        order = np.argsort(np.concatenate([rows for rows, _ in parts]))
        values, ids = (np.concatenate(each)[order] for each in list(zip(*found, strict=True))[:2])
        return Scores(values, ids, found[0].comm)

    def go_on(self, parents: Sequence[int], ids: Sequence[int]) -> None:
        """Let row r be row parents[r] with a further id; rows without a successor are dropped."""
        if list(parents) == list(range(len(self.texts))):
            for text, id_ in zip(self.texts, ids, strict=True):
                text.append(id_)
            return
        self.texts = [[*self.texts[p], id_] for p, id_ in zip(parents, ids, strict=True)]
        index = np.array(parents, np.int64)
        self._starts, self._read = self._starts[index], self._read[index]
        self._cache = self._cache.rows(index)

    def replace(self, text: Sequence[int]) -> None:
        """Let the only row hold another text. What both texts begin with stays read."""
        (old,), same = self.texts, 0
        while same < min(len(old), len(text) - 1) and old[same] == text[same]:
            same += 1
        self.texts = [list(text)]
        if self._starts[0] or not (self._cache.rewinds or same >= self._read[0]):
            self._cache, same = self.generator.new_cache(1), 0
        self._starts[0], self._read[0] = 0, min(same, self._read[0])

    def _scores(self, rows: IntArray, count: int) -> Scores | None:
        """Read the last `count` ids of some rows."""
        whole = len(rows) == len(self.texts)
        cache = self._cache if whole else self._cache.rows(rows)
        ids = np.array([self.texts[row][-count:] for row in rows], np.int64)  # [B, T]
        times = self._read[rows][:, None] + np.arange(count)
        cache.reserve(int(times.max()) + 1)
        batches = [
            self._batch(ids[part], _shared(times[part]), cache.rows(part))
            for part in _slices(len(rows), self._num_parts())
        ]
        found = self.generator.scores(batches)
        if not whole:
            self._cache.put(rows, cache)
        return found

    def _num_parts(self) -> int:
        return self.generator.most_parts

    def _batch(self, ids: IntArray, times: IntArray, cache: Cache) -> Batch:
        return self.generator.batch(ids, times, cache)


def _shared(times: IntArray) -> IntArray:
    """Return times [T] where those of all rows [B, T] are equal: a cache takes them faster."""
    return times[0] if (times == times[0]).all() else times


def _cut(rows: IntArray, most: int) -> list[IntArray]:
    return np.array_split(rows, -(-len(rows) // most))


def _slices(length: int, number: int) -> list[slice]:
    """Return `number` slices of [0, length), as equal as they can be, but none that is empty."""
    cuts = np.linspace(0, length, min(number, length) + 1).astype(int).tolist()
    return [slice(*pair) for pair in itertools.pairwise(cuts)]
