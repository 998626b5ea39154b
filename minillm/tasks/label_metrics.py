"""Metrics of predicted labels: functions of the confusion matrix, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.log import plural
from minillm.models.protocol import Batch
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.held_out_rows import HeldOutTexts, intervals_of

Metric = Callable[[np.ndarray], float]


def accuracy(confusion: np.ndarray) -> float:
    """Return the share of examples [actual, predicted] on the diagonal."""
    return float(np.trace(confusion) / confusion.sum())


def f1_micro(confusion: np.ndarray) -> float:
    """Return F1 from hits and misses of all labels together: with one label each, the accuracy."""
    return float(2 * np.trace(confusion) / (confusion.sum(0) + confusion.sum(1)).sum())


def f1_macro(confusion: np.ndarray) -> float:
    """Return the mean over labels of F1 = 2 tp / (actual + predicted).

    Labels that no example has and none was given do not count.
    """
    both = confusion.sum(0) + confusion.sum(1)
    return float(np.mean(2 * np.diag(confusion)[both > 0] / both[both > 0]))


def matthews(confusion: np.ndarray) -> float:
    """Return the Matthews correlation of several labels (Gorodkin 2004), 0 where it is 0 / 0."""
    n, actual, predicted = confusion.sum(), confusion.sum(1), confusion.sum(0)
    spread = (n**2 - (actual**2).sum()) * (n**2 - (predicted**2).sum())
    return (
        float((np.trace(confusion) * n - actual @ predicted) / np.sqrt(spread)) if spread else 0.0
    )


METRICS: Mapping[str, Metric] = {
    "accuracy": accuracy,
    "f1_micro": f1_micro,
    "f1_macro": f1_macro,
    "matthews": matthews,
}


def intervals(confusion: IntArray) -> dict[str, list[float]]:
    """Return the 95 % interval of each metric.

    Drawing n examples with replacement is drawing a confusion matrix from the multinomial
    distribution of its shares, so the examples themselves are not needed.
    """
    number = int(confusion.sum())
    shares = confusion.reshape(-1) / number

    def draw(rng: np.random.Generator) -> dict[str, float]:
        drawn = rng.multinomial(number, shares).reshape(confusion.shape).astype(np.float64)
        return {name: metric(drawn) for name, metric in METRICS.items()}

    return intervals_of(list(METRICS), draw)


class HeldOutLabels(HeldOutTexts):
    """Loss and confusion matrix over the first `num_rows` examples."""

    def __init__(
        self, examples: EncodedTexts, labels: Sequence[str], context: int, tokens: int | None
    ) -> None:
        super().__init__(examples, context, tokens)
        self.labels = labels
        cells = [_cell(a, p) for a in range(len(labels)) for p in range(len(labels))]
        self.sums: Sequence[str] = ("loss", *cells)

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return the number of examples in each cell of the confusion matrix that has some."""
        predicted = to_host(outputs[-1].data).argmax(1)
        both = np.stack([to_host(batch.arrays["labels"]), predicted], 1)
        cells, counts = np.unique(both, axis=0, return_counts=True)
        return {_cell(*cell): float(n) for cell, n in zip(cells.tolist(), counts, strict=True)}

    def result(self, sums: Mapping[str, float]) -> LabelEvaluation:
        """Return the metrics of the whole matrix."""
        size = range(len(self.labels))
        cells = [[round(sums[_cell(a, p)]) for p in size] for a in size]
        return LabelEvaluation(sums["loss"] / self.num_rows, np.array(cells, np.int64))


def _cell(actual: int, predicted: int) -> str:
    return f"{actual}>{predicted}"


@dataclass(frozen=True, eq=False)
class LabelEvaluation:
    """Quality of a classifier on held-out examples."""

    loss: float  # nats per example
    confusion: IntArray  # [actual, predicted]

    def _metrics(self) -> dict[str, float]:
        return {name: metric(self.confusion) for name, metric in METRICS.items()}

    def values(self) -> dict[str, float]:
        """Return the loss and the metrics."""
        return {"val_loss": self.loss} | {f"val_{k}": v for k, v in self._metrics().items()}

    def numbers(self) -> dict[str, Any]:
        """Return the loss, each metric with its 95 % interval, and the number of examples."""
        found: dict[str, Any] = {"loss": self.loss, **self._metrics()}
        found |= {f"{name}_95": pair for name, pair in intervals(self.confusion).items()}
        return found | {"examples": int(self.confusion.sum())}

    def criterion(self) -> float:
        """Return the share of wrong labels: the best checkpoint has the lowest."""
        return 1 - METRICS["accuracy"](self.confusion)

    def describe(self) -> str:
        """Return loss and accuracy as text."""
        return f"held-out loss {self.loss:#.4g}, accuracy {self._metrics()['accuracy']:.1%}"

    def summary(self, of: int) -> str:
        """Return all metrics as text, with the interval of the accuracy."""
        found, (low, high) = self._metrics(), intervals(self.confusion)["accuracy"]
        return (
            f"{self.describe()} ({low:.1%} to {high:.1%} with 95 %), F1 macro "
            f"{found['f1_macro']:.3f}, Matthews {found['matthews']:.3f}, over "
            f"{plural(int(self.confusion.sum()), 'example')}"
        )
