"""Order of examples: options that tasks on labelled examples share, and the rows of each step."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.record import option
from minillm.data.buckets import Buckets, Load, load
from minillm.data.options import SourceOptions


@dataclass(frozen=True, kw_only=True)
class ExampleOptions(SourceOptions):
    """Part of the options of examples that every task has."""

    TRAINS: ClassVar[tuple[str, ...]] = ("train",)
    MEASURES: ClassVar[tuple[str, ...]] = ("dev",)
    FIXED: ClassVar[tuple[str, ...]] = ("tokenizer",)

    train: str | None = option(None, announced=True, path=True)
    """Examples to train on; left out: generated ones."""
    dev: str | None = option(None, resumable=True, path=True)
    """Held-out examples; left out: one of 10 of --train, at most 1,000."""
    tokenizer: str = option("wordpiece:1000", path=True)
    """Tokens of a model from scratch: byte, char, bpe:SIZE or wordpiece:SIZE (learnt from the
    texts), or the path of a tokenizer.json, a vocab.txt, or a folder with one."""
    epochs: float | None = option(None, above=0, announced=True)
    """Passes over the training examples; left out: --steps decides."""
    shuffle: bool = option(True, announced=True)
    """Read the examples in random order, similar lengths together; --no-shuffle keeps that of the
    file."""
    truncate: bool = option(True, announced=True)
    """Cut texts that are longer than --context, and say how many; --no-truncate refuses them."""

    def steps(self, examples: int, batch: int) -> Mapping[str, Any]:
        """Return the options that say how long to train; {} where --steps does."""
        if self.epochs is None:
            return {}
        return {"epochs": None, "steps": max(1, math.ceil(self.epochs * examples / batch))}


class ExampleOrder:
    """Part of an `Unequal` task: which of the examples, `lengths` [N], a step has."""

    def __init__(
        self, lengths: IntArray, context: int, batch: int, seed: int, first: int, shuffle: bool
    ) -> None:
        self.lengths, self.context, self.batch_size = lengths, context, batch
        self.first, self.shuffle = first, shuffle
        self.order = Buckets(lengths, batch, seed, first=first)

    def rows(self, step: int) -> IntArray:
        """Return the examples of a step, by length."""
        if self.shuffle:
            return self.order.rows(step)
        start = self.first + step * self.batch_size
        rows = np.arange(start, start + self.batch_size) % len(self.lengths)
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def load(self, step: int, ranks: int, microbatches: int) -> Load:
        """Return the positions of step `step` on `ranks` data-parallel ranks."""
        lengths = self.order.row_lengths(self.rows(step))
        return load(lengths, ranks, microbatches, self.context)
