"""Order of examples: options that tasks on labelled examples share, and the rows of each step."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeVar

import numpy as np

from minillm.base.arrays import IntArray
from minillm.base.errors import ConfigError
from minillm.base.record import option
from minillm.data.labelled import DistinctT, split
from minillm.data.options import SourceOptions
from minillm.data.token_batches import TokenBatches, order_of


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

    def steps(self, examples: int, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return the options that say how long to train; {} where --steps does."""
        if self.epochs is None:
            return {}
        steps = (
            self.epochs * batch.number
            if isinstance(batch, TokenBatches)
            else self.epochs * examples / batch
        )
        return {"epochs": None, "steps": max(1, math.ceil(steps))}


def parts_of(
    options: ExampleOptions,
    built_in: str,
    make: Callable[[], Sequence[DistinctT]],
    read: Callable[[str], Sequence[DistinctT]],
) -> list[tuple[str, list[DistinctT]]]:
    """Return the examples to train on and those held out, each with the name of their source.

    `read` takes the path of a file. Without --train, `make` makes the examples called `built_in`.
    Without --dev, some of training are held out. Raises ConfigError as `read` does.
    """
    name = options.train or built_in
    found = make() if options.train is None else read(name)
    if options.dev is None:
        train, held_out = split(found)
        return [(name, train), (name, held_out)]
    return [(name, list(found)), (options.dev, list(read(options.dev)))]


def of_training(
    options: ExampleOptions, parts: Sequence[tuple[str, Sequence[DistinctT]]]
) -> list[DistinctT]:
    """Return the examples of --train out of `parts`: to train on, and held out without --dev."""
    own = parts if options.dev is None else parts[:1]
    return [each for _, part in own for each in part]


class Held(Protocol):
    """Dataset with examples held out."""

    source: str
    sha256: str
    num_held_out: int


HeldT = TypeVar("HeldT", bound=Held)


def unchanged(found: HeldT, sha256: str, noun: str) -> HeldT:
    """Return data of training that are read again to measure on what was held out.

    Raises ConfigError if they no longer have the hash `sha256`, or hold no `noun` out.
    """
    if found.sha256 != sha256:
        raise ConfigError(
            f"{found.source} has changed since training (sha256 {found.sha256[:12]}, was "
            f"{sha256[:12]}); put the old {noun}s back, or name others with --data"
        )
    if not found.num_held_out:
        raise ConfigError(f"{found.source} holds no {noun} out; name some with --data")
    return found


def labels_to_have(
    found: Sequence[str], had: Sequence[str] | None, asked: int | None, source: str
) -> list[str]:
    """Return the labels of a model for data that have the labels `found`.

    A model that knows its labels, of the number `asked`, keeps them. So does a new one from old
    weights, which `had` some, if these have all of the data's. Raises ConfigError for another
    number than is asked for.
    """
    keeps = had is not None and (asked is not None or set(found) <= set(had))
    labels = list(had if keeps and had is not None else found)
    if asked not in (None, len(labels)):
        raise ConfigError(
            f"--labels {asked}, but {source} has {len(found)}: {', '.join(found[:8])}; leave "
            "--labels out"
        )
    return labels


class ExampleOrder:
    """Part of an `Unequal` task: which of the examples, `lengths` [N], a step has."""

    together = False

    def __init__(
        self,
        lengths: IntArray,
        context: int,
        batch: int | TokenBatches,
        seed: int,
        first: int,
        shuffle: bool,
    ) -> None:
        self.lengths, self.context, self.first, self.shuffle = lengths, context, first, shuffle
        self.order = order_of(lengths, batch, seed, first)

    def rows(self, step: int) -> IntArray:
        """Return the examples of a step, by length."""
        if self.shuffle or isinstance(self.order, TokenBatches):
            return self.order.rows(step)
        size = self.order.batch
        rows = (self.first + step * size + np.arange(size)) % len(self.lengths)
        return rows[np.argsort(self.lengths[rows], kind="stable")]

    def row_lengths(self, step: int) -> IntArray:
        """Return the lengths of the examples of a step, int64 [rows, 1]."""
        return self.order.row_lengths(self.rows(step))


class Examples:
    """Part of a `Budgeted` dataset: the lengths of the examples to train on, and their order."""

    train: Any
    options: Any

    @property
    def lengths(self) -> IntArray:
        """The tokens of each example to train on, int64 [N]."""
        found: IntArray = self.train.lengths
        return found

    @property
    def shuffled(self) -> bool:
        """False if training reads the examples in the order of the file."""
        return bool(self.options.shuffle)
