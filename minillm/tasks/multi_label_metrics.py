"""Metrics of several labels a text: F1 and exact match, with bootstrap intervals."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.log import plural
from minillm.models.protocol import Batch
from minillm.tasks.encoded_texts import EncodedTexts
from minillm.tasks.held_out_rows import HeldOutTexts, intervals_of

NAMES = ("f1_micro", "f1_macro", "exact_match")


def f1(hits: np.ndarray, both: np.ndarray) -> float:
    """Return the mean of F1 = 2 hits / (actual + predicted) where the latter is not 0."""
    counted = both > 0
    return float(np.mean(2 * hits[counted] / both[counted])) if counted.any() else 0.0


class HeldOutMultiLabels(HeldOutTexts):
    """Loss over the first `num_rows` examples, and the labels that each gets. Implements `ByRow`.

    A label is predicted where its logit is above 0, its probability above one half.
    """

    sums: Sequence[str] = ("loss",)

    def __init__(
        self, examples: EncodedTexts, labels: Sequence[str], context: int, tokens: int | None
    ) -> None:
        super().__init__(examples, context, tokens)
        self.width = len(labels)

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return nothing: the numbers of each row are enough."""
        return {}

    def each(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return 1 for each label that a row gets, float64 [B, labels]."""
        return (to_host(outputs[-1].data) > 0).astype(np.float64)

    def result_of(self, sums: Mapping[str, float], rows: np.ndarray) -> MultiLabelEvaluation:
        """Return the metrics from the labels of all rows."""
        actual = self.examples.labels[: self.num_rows]
        loss = sums["loss"] / (self.num_rows * self.width)
        return MultiLabelEvaluation(loss, actual, rows.astype(np.int64))


@dataclass(frozen=True, eq=False)
class MultiLabelEvaluation:
    """Quality of a classifier with several labels a text."""

    loss: float  # nats per label of an example
    actual: IntArray  # 0 or 1, [N, labels]
    predicted: IntArray

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        """Hits of each label, actual and predicted of each, and all right: int64 [N, 2 L + 1]."""
        hits, both = self.actual & self.predicted, self.actual + self.predicted
        exact = (self.actual == self.predicted).all(1, keepdims=True)
        return np.concatenate([hits, both, exact], 1)

    def _metrics(self, times: np.ndarray) -> dict[str, float]:
        """Return the metrics where example i counts times[i]."""
        totals, size = (times @ self._counts).astype(np.float64), self.actual.shape[1]
        hits, both, exact = totals[:size], totals[size:-1], totals[-1]
        micro = f1(hits.sum(keepdims=True), both.sum(keepdims=True))
        found = (micro, f1(hits, both), float(exact / times.sum()))
        return dict(zip(NAMES, found, strict=True))

    def metrics(self) -> dict[str, float]:
        """Return each metric."""
        return self._metrics(np.ones(len(self.actual), np.int64))

    def intervals(self) -> dict[str, list[float]]:
        """Return the 95 % interval of each metric."""
        shares = np.full(len(self.actual), 1 / len(self.actual))
        return intervals_of(NAMES, lambda rng: self._metrics(rng.multinomial(len(shares), shares)))

    def values(self) -> dict[str, float]:
        """Return the loss and the metrics."""
        return {"val_loss": self.loss} | {f"val_{k}": v for k, v in self.metrics().items()}

    def numbers(self) -> dict[str, Any]:
        """Return the loss, each metric with its 95 % interval, and the number of examples."""
        found: dict[str, Any] = {"loss": self.loss, **self.metrics()}
        found |= {f"{name}_95": pair for name, pair in self.intervals().items()}
        return found | {"examples": len(self.actual)}

    def criterion(self) -> float:
        """Return 1 - F1 (micro): the best checkpoint has the lowest."""
        return 1 - self.metrics()["f1_micro"]

    def describe(self) -> str:
        """Return loss and F1 as text."""
        return f"held-out loss {self.loss:#.4g}, F1 micro {self.metrics()['f1_micro']:.3f}"

    def summary(self, of: int) -> str:
        """Return all metrics as text, with the interval of F1."""
        found, (low, high) = self.metrics(), self.intervals()["f1_micro"]
        return (
            f"{self.describe()} ({low:.3f} to {high:.3f} with 95 %), F1 macro "
            f"{found['f1_macro']:.3f}, exact match {found['exact_match']:.1%}, over "
            f"{plural(len(self.actual), 'example')}"
        )
