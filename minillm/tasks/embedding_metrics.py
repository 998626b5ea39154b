"""Metrics of embeddings: retrieval of positives among all candidates, or agreement with scores."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from minillm.autograd.tape import Tensor
from minillm.base.arrays import IntArray, to_host
from minillm.base.device import Device
from minillm.base.log import plural
from minillm.models.protocol import Batch
from minillm.params.where import Where
from minillm.tasks.encoded_related import EncodedRelated
from minillm.tasks.held_out_rows import intervals_of
from minillm.tasks.regression_metrics import pearson, spearman

DEPTH = 10  # of recall
CHUNK = 512  # anchors scored at once


class HeldOutRelated:
    """Vectors of the texts of the examples that the first `tokens` tokens fill. Implements `ByRow`.

    A row is a text. Equal texts are one.
    """

    sums: Sequence[str] = ("texts",)

    def __init__(
        self, examples: EncodedRelated, context: int, width: int, scale: float, tokens: int | None
    ) -> None:
        self.examples, self.context, self.width = examples, context, width
        self.scale = scale
        ends = np.cumsum(examples.lengths.sum(1))  # tokens up to each example
        number = max(1, int(np.searchsorted(ends, tokens, "right")) if tokens else len(ends))
        self.rows = examples.rows[:number]
        self.used = np.unique(self.rows)
        self.lengths, self.num_rows = examples.texts.lengths[self.used], len(self.used)

    def batch(self, rows: IntArray, device: Device) -> Batch:
        """Return the texts `rows` [B]."""
        where = Where(0, rows, device=device)
        return self.examples.texts.batch(self.used[rows], self.context, where, {})

    def count(self, outputs: tuple[Tensor, ...], batch: Batch) -> Mapping[str, Any]:
        """Return the number of texts."""
        return {"texts": float(len(outputs[-1].data))}

    def each(self, outputs: tuple[Tensor, ...], batch: Batch) -> np.ndarray:
        """Return the vector of each row, float64 [B, D]."""
        return to_host(outputs[-1].data).astype(np.float64)

    def result_of(
        self, sums: Mapping[str, float], rows: np.ndarray
    ) -> RetrievalEvaluation | ScoreEvaluation:
        """Return the metrics from the vectors of all rows."""
        vectors = np.zeros((len(self.examples.texts), self.width))
        vectors[self.used] = rows
        if self.examples.scores is None:
            return retrieval(vectors, self.rows, self.scale)
        first, second = vectors[self.rows[:, 0]], vectors[self.rows[:, 1]]
        scores = self.examples.scores[: len(self.rows)]
        return ScoreEvaluation(scores, (first * second).sum(1), self.scale)


def retrieval(vectors: np.ndarray, rows: IntArray, scale: float) -> RetrievalEvaluation:
    """Return the ranks of the positives for their anchors, and the loss of ranking them.

    vectors: float64 [texts, D] of length 1; rows: [N, k] texts of each example. Candidates are the
    different positives and hard negatives of all examples. Those that an equal anchor has as its
    positive, and the anchor's own text, are left out. Equal scores count against the positive.
    """
    candidates = np.unique(rows[:, 1:])
    places = {text: i for i, text in enumerate(candidates.tolist())}
    known = defaultdict[int, set[int]](set)
    for anchor, positive in rows[:, :2].tolist():
        known[anchor] |= {places[positive], places.get(anchor, places[positive])}
    ranks, losses = np.zeros(len(rows), np.int64), np.zeros(len(rows))
    for start in range(0, len(rows), CHUNK):
        part = rows[start : start + CHUNK]
        scores = vectors[part[:, 0]] @ vectors[candidates].T  # [n, C]
        for i, (anchor, positive) in enumerate(part[:, :2].tolist()):
            own, at = scores[i, places[positive]], places[positive]
            scores[i, list(known[anchor])] = -np.inf
            ranks[start + i] = 1 + np.count_nonzero(scores[i] >= own)
            scores[i, at] = own
            top = scores[i].max()
            losses[start + i] = np.log(np.exp(scale * (scores[i] - top)).sum()) + scale * (
                top - own
            )
    return RetrievalEvaluation(float(losses.mean()), ranks, len(candidates))


def cosent(scores: np.ndarray, cosines: np.ndarray, scale: float) -> float:
    """Return log(1 + sum of exp(scale (c_j - c_i))) over all pairs with score_i > score_j.

    It is the loss CoSENT (Su 2022) of cosines c [N] and scores [N].
    """
    order = np.argsort(scores, kind="stable")
    ranked, cosines = scores[order], scale * cosines[order]
    below = np.searchsorted(ranked, ranked, "left")  # number of lower scores
    sums = np.concatenate([[0.0], np.cumsum(np.exp(cosines - scale))])
    return float(np.log1p(np.sum(np.exp(scale - cosines) * sums[below])))


class _Evaluation:
    """Part of the metrics of embeddings that both kinds share."""

    names: Sequence[str]
    loss: float

    def drawn(self, rows: IntArray | slice) -> dict[str, float]:
        """Return each metric over some of the examples."""
        raise TypeError(f"{type(self).__name__} does not define drawn")

    def number(self) -> int:
        """Return the number of examples."""
        raise TypeError(f"{type(self).__name__} does not define number")

    def metrics(self) -> dict[str, float]:
        """Return each metric."""
        return self.drawn(slice(None))

    def intervals(self) -> dict[str, list[float]]:
        """Return the 95 % interval of each metric."""
        size = self.number()
        return intervals_of(self.names, lambda rng: self.drawn(rng.integers(0, size, size)))

    def values(self) -> dict[str, float]:
        """Return the loss and the metrics."""
        return {"val_loss": self.loss} | {f"val_{k}": v for k, v in self.metrics().items()}

    def numbers(self) -> dict[str, Any]:
        """Return the loss, each metric with its 95 % interval, and the number of examples."""
        found: dict[str, Any] = {"loss": self.loss, **self.metrics()}
        found |= {f"{name}_95": pair for name, pair in self.intervals().items()}
        return found | {"examples": self.number()}


@dataclass(frozen=True, eq=False)
class RetrievalEvaluation(_Evaluation):
    """Quality of retrieval by embeddings."""

    loss: float  # nats per anchor, among all candidates
    ranks: IntArray  # int64 [N]: rank of each anchor's positive, from 1
    candidates: int

    names = ("accuracy_at_1", f"recall_at_{DEPTH}", "mrr")

    def drawn(self, rows: IntArray | slice) -> dict[str, float]:
        """Return accuracy, recall and mean reciprocal rank over some of the anchors."""
        ranks = self.ranks[rows]
        found = (np.mean(ranks == 1), np.mean(ranks <= DEPTH), np.mean(1 / ranks))
        return dict(zip(self.names, map(float, found), strict=True))

    def number(self) -> int:
        """Return the number of anchors."""
        return len(self.ranks)

    def numbers(self) -> dict[str, Any]:
        """Return those of all embeddings, and the number of candidates."""
        return {**super().numbers(), "candidates": self.candidates}

    def criterion(self) -> float:
        """Return what the mean reciprocal rank lacks: the best checkpoint has the lowest."""
        return 1 - self.metrics()["mrr"]

    def describe(self) -> str:
        """Return loss, accuracy and mean reciprocal rank as text."""
        found = self.metrics()
        return (
            f"held-out loss {self.loss:#.4g}, accuracy at 1 {found['accuracy_at_1']:.1%}, MRR "
            f"{found['mrr']:.3f}"
        )

    def summary(self, of: int) -> str:
        """Return all metrics as text, with the interval of the accuracy."""
        low, high = self.intervals()["accuracy_at_1"]
        return (
            f"{self.describe()}, over {plural(len(self.ranks), 'anchor')} and {self.candidates:,} "
            f"candidates (accuracy {low:.1%} to {high:.1%} with 95 %)"
        )


@dataclass(frozen=True, eq=False)
class ScoreEvaluation(_Evaluation):
    """Agreement of cosines with scores."""

    actual: np.ndarray  # float64 [N]
    cosines: np.ndarray
    scale: float

    names = ("spearman", "pearson")

    @property
    def loss(self) -> float:  # type: ignore[override]
        """The loss CoSENT."""
        return cosent(self.actual, self.cosines, self.scale)

    def drawn(self, rows: IntArray | slice) -> dict[str, float]:
        """Return the correlations over some of the pairs."""
        both = self.actual[rows], self.cosines[rows]
        return {"spearman": spearman(*both), "pearson": pearson(*both)}

    def number(self) -> int:
        """Return the number of pairs."""
        return len(self.actual)

    def criterion(self) -> float:
        """Return what Spearman's correlation lacks: the best checkpoint has the lowest."""
        return 1 - self.metrics()["spearman"]

    def describe(self) -> str:
        """Return the correlations as text."""
        found = self.metrics()
        return f"held-out Spearman {found['spearman']:.3f}, Pearson {found['pearson']:.3f}"

    def summary(self, of: int) -> str:
        """Return all metrics as text, with the interval of Spearman's correlation."""
        low, high = self.intervals()["spearman"]
        return (
            f"{self.describe()}, over {plural(len(self.actual), 'pair')} (Spearman {low:.3f} to "
            f"{high:.3f} with 95 %)"
        )
