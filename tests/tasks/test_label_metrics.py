"""Metrics of labels: equal to their definitions by examples."""

from __future__ import annotations

import numpy as np
import pytest

from minillm.tasks.label_metrics import METRICS, accuracy, f1_macro, intervals, matthews


def drawn(labels: int, number: int = 200) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, predictions that are right in about half of all cases, and their matrix."""
    rng = np.random.default_rng(labels)
    actual = rng.integers(0, labels, number)
    predicted = np.where(rng.random(number) < 0.5, actual, rng.integers(0, labels, number))
    confusion = np.zeros((labels, labels), np.int64)
    for a, p in zip(actual, predicted, strict=True):
        confusion[a, p] += 1
    return actual, predicted, confusion


@pytest.mark.parametrize("labels", [2, 3, 7])
def test_metrics_are_their_definitions(labels: int) -> None:
    actual, predicted, confusion = drawn(labels)
    assert accuracy(confusion) == pytest.approx((actual == predicted).mean(), rel=1e-14)
    scores = []
    for label in range(labels):
        hits = ((actual == label) & (predicted == label)).sum()
        precision, recall = hits / (predicted == label).sum(), hits / (actual == label).sum()
        scores.append(2 * precision * recall / (precision + recall))
    assert f1_macro(confusion) == pytest.approx(np.mean(scores), rel=1e-14)
    # The correlation of one-hot labels, summed over labels before it is divided (Gorodkin 2004).
    x, y = (np.eye(labels)[each] - np.eye(labels)[each].mean(0) for each in (actual, predicted))
    expected = (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())
    assert matthews(confusion) == pytest.approx(expected, rel=1e-12)


def test_matthews_of_two_labels_is_the_correlation() -> None:
    actual, predicted, confusion = drawn(2)
    assert matthews(confusion) == pytest.approx(np.corrcoef(actual, predicted)[0, 1], rel=1e-12)


def test_labels_without_examples() -> None:
    assert f1_macro(np.array([[3, 0, 0], [0, 2, 0], [0, 0, 0]])) == 1.0  # the third is not there
    assert f1_macro(np.array([[3, 0, 1], [0, 2, 0], [0, 0, 0]])) == pytest.approx((6 / 7 + 1) / 3)
    assert matthews(np.array([[4, 0], [3, 0]])) == 0.0


def test_intervals_are_those_of_examples_drawn_again() -> None:
    """Ends of intervals from 1,000 resamples of 200 scatter by about 0.005."""
    actual, predicted, confusion = drawn(3)
    rng, found = np.random.default_rng(1), []
    for _ in range(4000):
        rows = rng.integers(0, 200, 200)
        again = np.zeros((3, 3), np.int64)
        np.add.at(again, (actual[rows], predicted[rows]), 1)
        found.append([metric(again) for metric in METRICS.values()])
    expected = np.quantile(found, [0.025, 0.975], axis=0).T
    for pair, name in zip(expected, METRICS, strict=True):
        low, high = intervals(confusion)[name]
        assert abs(low - pair[0]) < 0.02 and abs(high - pair[1]) < 0.02 and low < high
