"""Protocols of what a model learns: objectives, their data, the batches of a step, and measures.

Objective  options -> Dataset          tokens, vocabulary, hash; one objective a file
Dataset    -> Task                     training batches and the divisors of the losses
Dataset    -> Measure -> Result        sums over held-out rows, and the metrics they give
Dataset    -> references               sources, and texts to compare with what a model writes
Objective  -> Predictor                numbers for each input of a file, and their meaning
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray
from minillm.base.device import Device
from minillm.base.record import Record
from minillm.comm.communicator import Communicator
from minillm.data.options import SourceOptions
from minillm.data.token_batches import TokenBatches
from minillm.models.family import Shape
from minillm.models.protocol import Batch


class Task(Protocol):
    """Training objective: the batches of a step, and the losses that the model computes on them."""

    losses: Sequence[str]  # names, the same on every rank

    def batch(self, step: int, rows: IntArray, device: Device) -> Batch:
        """Return the sequences `rows` [B] of step `step`, arrays on `device`.

        A function of its arguments and the seed: any rank of any mesh can ask for any rows. The
        divisors count over the global batch of the step.
        """


@runtime_checkable
class Unequal(Task, Protocol):
    """Task on sequences of unequal lengths, such as `minillm.data.buckets` orders.

    The rows of a step are sorted by length, and data-parallel rank r of n takes rows[r::n]. Without
    `row_lengths` a rank takes the next block of rows.
    """

    together: bool
    """True if all parts of the rows of a microbatch are padded to one length."""

    def row_lengths(self, step: int) -> IntArray:
        """Return the lengths of the rows of a step, int64 [rows, K], for K parts of each."""


@runtime_checkable
class Continuing(Task, Protocol):
    """Task on streams, for models that carry a state: row b goes on in the next step's row b."""

    def continues(self, step: int) -> bool:
        """Return whether the rows of `step` continue those of the step before."""


class Measure(Protocol):
    """Metrics of a task on one data set. They follow from sums over all rows."""

    num_rows: int
    sums: Sequence[str]  # names of losses and counts that are added up, the same on every rank

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the examples `rows` [B], arrays on `device`, losses divided by 1."""

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return counts over the last stage's outputs, by name: hits, misses, ...

        {} where the losses are all that is needed.
        """

    def result(self, sums: Mapping[str, float]) -> Result:
        """Return the metrics from the sums over all rows."""


@runtime_checkable
class ByRow(Protocol):
    """Measure whose metrics need the numbers of each row, such as ranks or windows of one text.

    Every rank gets the numbers of all rows.
    """

    num_rows: int
    sums: Sequence[str]
    width: int  # numbers of a row

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the examples `rows` [B], which are also the samples of its addresses."""

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return counts over the last stage's outputs, by name."""

    def each(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the numbers of each row from the last stage's outputs, float64 [B, width]."""

    def result_of(self, sums: Mapping[str, float], rows: np.ndarray) -> Result:
        """Return the metrics from the sums and the numbers of all rows [num_rows, width]."""


@runtime_checkable
class OfLengths(Protocol):
    """Part of a measure whose rows have unequal lengths: similar ones share a microbatch."""

    lengths: IntArray  # of the rows, int64 [num_rows]


class Result(Protocol):
    """Metrics of a model on one data set."""

    def values(self) -> dict[str, float]:
        """Return what a line of metrics.jsonl holds."""

    def numbers(self) -> dict[str, Any]:
        """Return all metrics as a JSON value."""

    def describe(self) -> str:
        """Return the metrics that are shown while training goes on, as text."""

    def summary(self, of: int) -> str:
        """Return all metrics as text, and their share of the `of` tokens that exist."""


@runtime_checkable
class Judged(Result, Protocol):
    """Metrics whose best checkpoint is not the one of the lowest loss."""

    def criterion(self) -> float:
        """Return the number that is lowest for the best model."""


class Dataset(Protocol):
    """Data of a run or of a measurement: equal on every rank, read by rows."""

    source: str  # name, for messages
    sha256: str  # of the content
    vocab_size: int  # different tokens; 0 without a vocabulary
    num_held_out: int  # targets that exist in the held-out part; 0: nothing is held out

    def vocabulary(self) -> dict[str, Any]:
        """Return what gives ids their meaning, such as a tokenizer, as a JSON value.

        Checkpoints keep it.
        """

    def describe(self) -> str:
        """Return one line for the plan: source, sizes, vocabulary, hash."""

    def task(self, shape: Any, *, batch: int, seed: int, first: int = 0) -> Task:
        """Return the training batches of `batch` sequences for a model of `shape`.

        Row r of step s is sequence number first + s * batch + r, a function of it and `seed` alone.
        """

    def measure(self, shape: Any, tokens: int | None) -> Measure | ByRow:
        """Return the measure over the first `tokens` held-out targets, None: over all."""

    def prompt(self) -> Sequence[int]:
        """Return the ids that a sample at the end of a run continues; empty without a sample."""


@runtime_checkable
class Deciding(Dataset, Protocol):
    """Dataset that decides options of a run, such as the number of labels."""

    def decides(self, batch: int | TokenBatches) -> Mapping[str, Any]:
        """Return the values of options that follow from the data.

        `batch` sequences make a step, or the batches by tokens do.
        """


@runtime_checkable
class Budgeted(Dataset, Protocol):
    """Dataset whose sequences have lengths that are known, so that tokens can fill a batch."""

    lengths: IntArray  # of the training sequences, int64 [N] or [N, K]
    shuffled: bool  # False: they keep their order

    def task(self, shape: Any, *, batch: int | TokenBatches, seed: int, first: int = 0) -> Task:
        """Return the training batches; those by tokens know their seed and beginning."""


@runtime_checkable
class Replying(Dataset, Protocol):
    """Dataset whose sample is one reply, which ends before one of `stops`."""

    stops: Sequence[str]


@runtime_checkable
class Written(Dataset, Protocol):
    """Dataset whose held-out part has sources, for which a model writes texts, and references."""

    num_scored: int  # references that the end of a training compares with, from the first; 0: none

    def references(self, tokens: int | None) -> Sequence[tuple[str, str]]:
        """Return source and reference of the first `tokens` held-out targets, None: of all."""


class Objective(Protocol):
    """Objective of training, by name in `minillm.models.family.Family.objective`."""

    name: str
    options: type[SourceOptions]  # flags of training
    measured: type[Record]  # flags of `minillm evaluate` that name other data

    def load(
        self, options: Any, shape: Any, vocabulary: Mapping[str, Any] | None, comm: Communicator
    ) -> Dataset:
        """Load the data of `options` for a model of the options `shape`. Collective.

        `vocabulary` is that of a checkpoint, and replaces what `options` say. Raises ConfigError on
        every rank for data that are missing, damaged or too small.
        """

    def held_out(
        self,
        asked: Any,
        trained: Any,
        shape: Shape,
        vocabulary: Mapping[str, Any],
        sha256: str,
        comm: Communicator,
    ) -> Dataset:
        """Load what `minillm evaluate` measures, all of it held out. Collective.

        It is what `asked` names, else the held-out part of the data of `trained`. Raises
        ConfigError on every rank if these no longer have the hash `sha256`.
        """


class Predictor(Protocol):
    """Predictions of a trained model: numbers for each input of a file, and a line of JSON.

    An input becomes one row of a batch or several, such as windows of a long text.
    """

    noun: str  # an input, as progress counts it: "text", "question", ...
    width: int  # numbers that make up the prediction for an input
    num_cut: int  # inputs so far that were longer than the model reads

    def read(self, path: str) -> Sequence[Any]:
        """Return the inputs of a file, JSON values. Called on the first rank alone.

        Raises ConfigError for a file that is missing or damaged.
        """

    def size(self, example: Any) -> int:
        """Return a measure of the length of an input, so that those of a batch are similar."""

    def encode(self, inputs: Sequence[Any]) -> InputRows:
        """Return the rows of some inputs. Raises ConfigError for an input without ids."""

    def values(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the numbers of each row [B, ...] from the last stage's outputs, float64."""

    def line(self, example: Any, values: np.ndarray) -> Mapping[str, Any]:
        """Return the prediction for an input from its numbers [width], as a JSON object."""


class InputRows(Protocol):
    """Rows of some inputs of a predictor."""

    sizes: Sequence[int] | IntArray  # tokens of each row

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the rows `rows` [B], arrays on `device`."""

    def merged(self, values: np.ndarray) -> np.ndarray:
        """Return the numbers of each input [inputs, width] from those of all rows [N, ...]."""


@runtime_checkable
class Predicting(Objective, Protocol):
    """Objective whose models predict."""

    predicted: type[Record]  # flags of `minillm predict` about its inputs

    def predictor(
        self, asked: Any, trained: Any, vocabulary: Mapping[str, Any], vocab: int, context: int
    ) -> Predictor:
        """Return the predictor of a model that reads `context` tokens of a vocabulary of `vocab`.

        `asked` are flags of `predicted`, `trained` the options of its training. Raises ConfigError.
        """
