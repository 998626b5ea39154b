"""Metrics of entities: precision, recall and F1 from counts of spans, as the package seqeval has.

An entity is right if its words and its type are. "default" reads predicted tags leniently, as
conlleval does; "strict" takes valid IOB2 alone (`minillm.data.tags`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.device import Device
from minillm.base.log import plural
from minillm.data.tags import OUTSIDE, Span, spans_of, strict_spans_of, types_of
from minillm.metrics.protocol import SHARE, resampled
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_words import EncodedWords

READERS: Mapping[str, Callable[[Sequence[str]], list[Span]]] = {
    "default": spans_of,
    "strict": strict_spans_of,
}
"""Mode -> how it reads the entities of predicted tags."""
KINDS = 3  # numbers of a type: right, predicted and actual entities


def counts_of(
    actual: Sequence[Span], predicted: Sequence[Span], types: Sequence[str]
) -> np.ndarray:
    """Return the right, predicted and actual entities of a sentence by type, float64 [types, 3]."""
    right = Counter(span.type for span in set(actual) & set(predicted))
    both = (right, Counter(span.type for span in predicted), Counter(span.type for span in actual))
    return np.array([[of[type_] for of in both] for type_ in types], np.float64).reshape(-1, KINDS)


def scores(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall and F1 [..., 3] of counts [..., 3]; 0 where they are 0 / 0."""
    right, predicted, actual = np.moveaxis(counts, -1, 0)
    parts = ((right, predicted), (right, actual), (2 * right, predicted + actual))
    found = [np.divide(a, b, out=np.zeros_like(a), where=b > 0) for a, b in parts]
    return np.stack(found, -1)


def micro(counts: np.ndarray) -> np.ndarray:
    """Return precision, recall and F1 [..., 3] over all types, from counts [..., types, 3]."""
    return scores(counts.sum(-2))


def macro(counts: np.ndarray) -> np.ndarray:
    """Return the means of precision, recall and F1 [..., 3] over the types that occur.

    A type occurs if an entity of it is actual or predicted, as in seqeval.
    """
    occurs = counts[..., 1:].sum(-1) > 0  # [..., types]
    total = (scores(counts) * occurs[..., None]).sum(-2)
    return total / np.maximum(occurs.sum(-1), 1)[..., None]


AVERAGES: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {"": micro, "_macro": macro}
NAMES = ("precision", "recall", "f1")


def intervals(rows: np.ndarray) -> dict[str, list[float]]:
    """Return the 95 % interval of each metric by the percentile bootstrap over sentences.

    rows: [N, types, 3], the counts of each sentence.
    """
    drawn = resampled(rows.reshape(len(rows), -1)).reshape(-1, *rows.shape[1:])
    found: dict[str, list[float]] = {}
    for suffix, average in AVERAGES.items():
        ends = np.quantile(average(drawn), [(1 - SHARE) / 2, (1 + SHARE) / 2], axis=0)
        found |= {f"{name}{suffix}_95": ends[:, i].tolist() for i, name in enumerate(NAMES)}
    return found


class HeldOutTags:
    """Loss, right labels, and counts of entities by sentence. Implements `ByRow`."""

    sums: Sequence[str] = ("loss", "hits", "words")

    def __init__(
        self, sentences: EncodedWords, labels: Sequence[str], context: int, tokens: int | None
    ) -> None:
        self.sentences, self.labels, self.context = sentences, labels, context
        ends = np.cumsum(sentences.lengths)  # tokens up to each sentence
        within = int(np.searchsorted(ends, tokens, "right")) if tokens else len(ends)
        self.num_rows, self.types = max(1, within), types_of(labels)
        self.lengths = sentences.lengths[: self.num_rows]
        self.width = len(READERS) * len(self.types) * KINDS

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the sentences `rows` [B]."""
        where = Where(0, rows, device=device)
        return self.sentences.batch(rows, self.context, where, {"loss": 1.0})

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return the words whose label is right, and all words that the model reads."""
        found = to_host(outputs[-1].data).argmax(1)
        labels = to_host(batch.arrays["labels"])
        words = int(self.sentences.counts[batch.where.samples].sum())
        return {"hits": float((found == labels).sum()), "words": float(words)}

    def each(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the counts of each sentence [B, width], by mode, type and kind.

        Words that the model does not read are predicted to be outside.
        """
        rows, found = batch.where.samples, to_host(outputs[-1].data).argmax(1)
        outside = self.labels.index(OUTSIDE)
        predicted = self.sentences.of_words(rows, found, outside)
        counts = np.zeros((len(rows), len(READERS), len(self.types), KINDS))
        for i, row in enumerate(rows):
            actual = spans_of([self.labels[n] for n in self.sentences.labels[row]])
            tags = [self.labels[n] for n in predicted[i]]
            for mode, read in enumerate(READERS.values()):
                counts[i, mode] = counts_of(actual, read(tags), self.types)
        return counts.reshape(len(rows), self.width)

    def result_of(self, sums: Mapping[str, float], rows: np.ndarray) -> TagEvaluation:
        """Return the metrics from the sums and the counts of all sentences [N, width]."""
        shape = (len(rows), len(READERS), len(self.types), KINDS)
        number = max(1.0, sums["words"])
        loss, accuracy = sums["loss"] / number, sums["hits"] / number
        unread = sum(map(len, self.sentences.labels[: len(rows)])) - round(sums["words"])
        return TagEvaluation(loss, accuracy, unread, self.types, rows.reshape(shape))


@dataclass(frozen=True, eq=False)
class TagEvaluation:
    """Quality of a tagger on held-out sentences."""

    loss: float  # nats per word
    accuracy: float  # share of the words it reads whose label is right
    unread: int  # words without a label: cut off, or without a piece
    types: Sequence[str]
    rows: np.ndarray  # [sentences, modes, types, kinds]

    @cached_property
    def counts(self) -> np.ndarray:
        """Counts over all sentences, [modes, types, kinds]."""
        return np.asarray(self.rows.sum(0))

    def _metrics(self, mode: int = 0) -> dict[str, float]:
        return {
            f"{name}{suffix}": float(value)
            for suffix, average in AVERAGES.items()
            for name, value in zip(NAMES, average(self.counts[mode]), strict=True)
        }

    def values(self) -> dict[str, float]:
        """Return the loss, and the metrics in the default mode."""
        found = {"loss": self.loss, "accuracy": self.accuracy, **self._metrics()}
        return {f"val_{name}": value for name, value in found.items()}

    def numbers(self) -> dict[str, Any]:
        """Return the metrics with 95 % intervals, those of each type, and those of strict mode."""
        each = zip(self.types, scores(self.counts[0]), self.counts[0], strict=True)
        return {
            "loss": self.loss,
            "accuracy": self.accuracy,
            **self._metrics(),
            **self._intervals,
            "types": {
                type_: dict(zip(NAMES, found.tolist(), strict=True)) | {"entities": int(counts[2])}
                for type_, found, counts in each
            },
            "strict": self._metrics(1),
            "sentences": len(self.rows),
            "entities": int(self.counts[0, :, 2].sum()),
            "words_unread": self.unread,
        }

    @cached_property
    def _intervals(self) -> dict[str, list[float]]:
        return intervals(self.rows[:, 0])

    def criterion(self) -> float:
        """Return 1 - F1: the best checkpoint has the lowest."""
        return 1 - self._metrics()["f1"]

    def describe(self) -> str:
        """Return loss and F1 as text."""
        return f"held-out loss {self.loss:#.4g}, F1 {self._metrics()['f1']:.1%}"

    def summary(self, of: int) -> str:
        """Return precision, recall and F1 as text, with the interval of F1."""
        found, (low, high) = self._metrics(), self._intervals["f1_95"]
        number = int(self.counts[0, :, 2].sum())
        return (
            f"{self.describe()} ({low:.1%} to {high:.1%} with 95 %), precision "
            f"{found['precision']:.1%}, recall {found['recall']:.1%}, F1 macro "
            f"{found['f1_macro']:.3f}, over {number} entit{'y' if number == 1 else 'ies'} in "
            f"{plural(len(self.rows), 'sentence')}"
        )
