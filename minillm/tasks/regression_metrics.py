"""Metrics of predicted numbers: squared error and correlations, with bootstrap intervals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import to_host
from minillm.base.log import plural
from minillm.models.protocol import Batch
from minillm.tasks.held_out_rows import HeldOutTexts, intervals_of

NAMES = ("mse", "pearson", "spearman")


def pearson(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation of x and y [N], 0 where one of them is constant."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    x, y = x - x.mean(), y - y.mean()
    return float((x @ y) / (np.sqrt(x @ x) * np.sqrt(y @ y)))


def ranks(x: np.ndarray) -> np.ndarray:
    """Return the ranks of x [N] from 1, float64; ties have the mean of theirs."""
    _, inverse, counts = np.unique(x, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    found: np.ndarray = (last - (counts - 1) / 2)[inverse]
    return found


def spearman(x: np.ndarray, y: np.ndarray) -> float:
    """Return the correlation of the ranks of x and y [N] (Spearman 1904)."""
    return pearson(ranks(x), ranks(y))


def metrics(actual: np.ndarray, predicted: np.ndarray) -> dict[str, float]:
    """Return the metrics of predictions [N]."""
    error = predicted - actual
    found = (float(np.mean(error * error)), pearson(actual, predicted), spearman(actual, predicted))
    return dict(zip(NAMES, found, strict=True))


class HeldOutNumbers(HeldOutTexts):
    """Numbers that the first `num_rows` examples get. Implements `ByRow`."""

    sums: Sequence[str] = ("loss",)
    width = 1

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return nothing: the numbers of each row are enough."""
        return {}

    def each(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the number of each row, float64 [B, 1]."""
        return to_host(outputs[-1].data).astype(np.float64)

    def result_of(self, sums: Mapping[str, float], rows: np.ndarray) -> NumberEvaluation:
        """Return the metrics from the numbers of all rows."""
        loss = sums["loss"] / self.num_rows
        return NumberEvaluation(loss, self.examples.labels[: self.num_rows], rows[:, 0])


@dataclass(frozen=True, eq=False)
class NumberEvaluation:
    """Quality of a regression on held-out examples."""

    loss: float  # mean squared error, as in training
    actual: np.ndarray  # float64 [N]
    predicted: np.ndarray

    def metrics(self) -> dict[str, float]:
        """Return each metric."""
        return metrics(self.actual, self.predicted)

    def intervals(self) -> dict[str, list[float]]:
        """Return the 95 % interval of each metric."""

        def draw(rng: np.random.Generator) -> dict[str, float]:
            rows = rng.integers(0, len(self.actual), len(self.actual))
            return metrics(self.actual[rows], self.predicted[rows])

        return intervals_of(NAMES, draw)

    def values(self) -> dict[str, float]:
        """Return the loss and the metrics."""
        return {"val_loss": self.loss} | {f"val_{k}": v for k, v in self.metrics().items()}

    def numbers(self) -> dict[str, Any]:
        """Return the loss, each metric with its 95 % interval, and the number of examples."""
        found: dict[str, Any] = {"loss": self.loss, **self.metrics()}
        found |= {f"{name}_95": pair for name, pair in self.intervals().items()}
        return found | {"examples": len(self.actual)}

    def criterion(self) -> float:
        """Return the squared error: the best checkpoint has the lowest."""
        return self.loss

    def describe(self) -> str:
        """Return the error and a correlation as text."""
        found = self.metrics()
        return f"held-out squared error {found['mse']:#.4g}, Spearman {found['spearman']:.3f}"

    def summary(self, of: int) -> str:
        """Return all metrics as text, with the interval of Spearman's correlation."""
        low, high = self.intervals()["spearman"]
        return (
            f"{self.describe()} ({low:.3f} to {high:.3f} with 95 %), Pearson "
            f"{self.metrics()['pearson']:.3f}, over {plural(len(self.actual), 'example')}"
        )
