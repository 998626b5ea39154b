"""Protocol of metrics of texts, and their numbers on a corpus with bootstrap intervals.

Each sentence has statistics that are added up: n-gram counts, lengths. A formula turns sums into
scores. So ranks that share the sentences add sums, and a bootstrap adds those of drawn sentences.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

RESAMPLES, SHARE = 1000, 0.95
MOST_DRAWN = 1 << 22  # counts of drawn sentences that exist at once, 32 MiB


class TextMetric(Protocol):
    """Corpus metric: additive statistics of a sentence, and scores that follow from their sums."""

    width: int  # statistics of a sentence

    @property
    def headline(self) -> Sequence[str]:
        """Names of the scores that get an interval."""

    @property
    def signature(self) -> Mapping[str, str]:
        """Name -> text that says how the scores were computed."""

    def statistics(self, hypothesis: str, references: Sequence[str]) -> list[float]:
        """Return the statistics [width] of a text against its references, one or several."""

    def scores(self, sums: np.ndarray) -> dict[str, np.ndarray]:
        """Return the scores [...] by name from sums [..., width] over the sentences of a corpus."""


def statistics_of(
    metrics: Sequence[TextMetric], hypothesis: str, references: Sequence[str]
) -> list[float]:
    """Return the statistics of all `metrics`, one after another."""
    return [each for metric in metrics for each in metric.statistics(hypothesis, references)]


def num_statistics(metrics: Sequence[TextMetric]) -> int:
    """Return the number of statistics of a sentence."""
    return sum(metric.width for metric in metrics)


def numbers_of(metrics: Sequence[TextMetric], rows: np.ndarray) -> dict[str, Any]:
    """Return scores, 95 % intervals and signatures by name, as JSON values.

    `rows` [N, W] are the statistics of all sentences. An interval is named like its score, with
    `_95` behind it.
    """
    sums, drawn, found, first = rows.sum(0), resampled(rows), dict[str, Any](), 0
    for metric in metrics:
        own = slice(first, first + metric.width)
        first += metric.width
        scores, ends = metric.scores(sums[own]), intervals(metric, drawn[:, own])
        for name, value in scores.items():
            found[name] = float(value)
            if name in ends:
                found[f"{name}_95"] = ends[name]
        found |= metric.signature
    return found


def intervals(metric: TextMetric, drawn: np.ndarray) -> dict[str, list[float]]:
    """Return the 95 % interval of each headline score from the sums [R, width] of resamples.

    Percentile bootstrap (Efron 1979; Koehn 2004 for BLEU).
    """
    scores, shares = metric.scores(drawn), [(1 - SHARE) / 2, (1 + SHARE) / 2]
    return {name: np.quantile(scores[name], shares).tolist() for name in metric.headline}


def resampled(rows: np.ndarray, seed: int = 0) -> np.ndarray:
    """Return sums [R, W] of N rows that are drawn with replacement from `rows` [N, W]."""
    rng, number = np.random.default_rng(seed), len(rows)
    at_once, out = max(1, MOST_DRAWN // number), np.empty((RESAMPLES, rows.shape[1]))
    for first in range(0, RESAMPLES, at_once):
        some = out[first : first + at_once]
        some[...] = rng.multinomial(number, np.full(number, 1 / number), len(some)) @ rows
    return out
