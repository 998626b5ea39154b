"""Metrics of labels: equal to their definitions by examples."""

from __future__ import annotations

import numpy as np
import pytest

from minillm.tasks.label_metrics import (
    METRICS,
    accuracy,
    f1_macro,
    f1_micro,
    intervals,
    matthews,
)
from minillm.tasks.multi_label_metrics import MultiLabelEvaluation
from minillm.tasks.regression_metrics import NumberEvaluation, pearson, ranks, spearman


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


def test_f1_micro_of_one_label_each_is_the_accuracy() -> None:
    _, _, confusion = drawn(3)
    assert f1_micro(confusion) == pytest.approx(accuracy(confusion), rel=1e-14)


def test_f1_of_several_labels_is_its_definition() -> None:
    rng = np.random.default_rng(3)
    actual, predicted = (rng.random((2, 60, 4)) < 0.4).astype(np.int64)
    actual[:, 3] = predicted[:, 3] = 0  # a label that is not there
    found = MultiLabelEvaluation(0.5, actual, predicted)
    scores = []
    for a, p in [*zip(actual.T[:3], predicted.T[:3], strict=True)]:
        precision, recall = (a & p).sum() / p.sum(), (a & p).sum() / a.sum()
        scores.append(2 * precision * recall / (precision + recall))
    hits = (actual & predicted).sum()
    precision, recall = hits / predicted.sum(), hits / actual.sum()
    expected = {
        "f1_micro": 2 * precision * recall / (precision + recall),
        "f1_macro": np.mean(scores),
        "exact_match": np.mean([(a == p).all() for a, p in zip(actual, predicted, strict=True)]),
    }
    for name, value in expected.items():
        assert found.metrics()[name] == pytest.approx(value, rel=1e-14)
        low, high = found.intervals()[name]
        assert low < value < high
    assert found.criterion() == pytest.approx(1 - expected["f1_micro"])
    drawn_again = []
    for _ in range(2000):
        rows = rng.integers(0, 60, 60)
        drawn_again.append(MultiLabelEvaluation(0.5, actual[rows], predicted[rows]).metrics())
    ends = np.quantile([each["f1_micro"] for each in drawn_again], [0.025, 0.975])
    np.testing.assert_allclose(found.intervals()["f1_micro"], ends, atol=0.015)


def test_correlations_are_their_definitions() -> None:
    rng = np.random.default_rng(5)
    x = rng.integers(0, 9, 80).astype(float)  # with ties
    y = np.round(x + rng.normal(0, 3, 80))
    assert pearson(x, y) == pytest.approx(np.corrcoef(x, y)[0, 1], rel=1e-12)
    mean_ranks = [(np.sum(x < each) + np.sum(x <= each) + 1) / 2 for each in x]
    assert ranks(x).tolist() == mean_ranks
    others = [(np.sum(y < each) + np.sum(y <= each) + 1) / 2 for each in y]
    assert spearman(x, y) == pytest.approx(np.corrcoef(mean_ranks, others)[0, 1], rel=1e-12)
    assert pearson(x, np.ones(80)) == spearman(np.ones(80), y) == 0.0
    assert spearman(np.arange(5.0), np.exp(np.arange(5.0))) == pytest.approx(1)
    found = NumberEvaluation(1.0, x, y)
    assert found.metrics()["mse"] == pytest.approx(np.mean((x - y) ** 2))
    for name, (low, high) in found.intervals().items():
        assert low < found.metrics()[name] < high


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(6)
    for number in (5, 40):
        x, y = rng.integers(0, 7, (2, number))
        assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y).statistic, rel=1e-12)
        assert pearson(x, y) == pytest.approx(stats.pearsonr(x, y).statistic, rel=1e-12)
