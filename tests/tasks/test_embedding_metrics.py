"""Metrics of embeddings: worked examples, plain definitions, and pairs that do not count."""

from __future__ import annotations

import numpy as np
import pytest

from minillm.tasks.embedding_metrics import ScoreEvaluation, cosent, retrieval


def unit(*angles: float) -> np.ndarray:
    """Return vectors in a plane at these angles, in degrees."""
    radians = np.radians(angles)
    return np.stack([np.cos(radians), np.sin(radians)], 1)


def test_ranks_of_a_worked_example() -> None:
    """Three anchors at 0, 90 and 180 degrees, their positives at 10, 30 and 175."""
    vectors = unit(0, 90, 180, 10, 30, 175)
    found = retrieval(vectors, np.array([[0, 3], [1, 4], [2, 5]]), 20.0)
    assert found.ranks.tolist() == [1, 1, 1] and found.candidates == 3
    found = retrieval(vectors, np.array([[0, 4], [1, 3], [2, 5]]), 20.0)
    assert found.ranks.tolist() == [2, 2, 1]
    numbers = found.numbers()
    assert numbers["accuracy_at_1"] == pytest.approx(1 / 3)
    assert numbers["mrr"] == pytest.approx(2 / 3) and numbers["recall_at_10"] == 1
    assert numbers["examples"] == 3 and numbers["candidates"] == 3
    low, high = numbers["accuracy_at_1_95"]
    assert 0 <= low < 1 / 3 < high <= 1
    cosines = np.cos(np.radians([[30, 10, 175], [60, 80, 85], [150, 170, 5]]))
    shares = np.exp(20 * cosines)
    expected = -np.log(shares[np.arange(3), np.arange(3)] / shares.sum(1)).mean()
    assert found.loss == pytest.approx(expected, rel=1e-12)


def test_hard_negatives_are_candidates_and_known_positives_are_not() -> None:
    """Put an equal anchor's positive closer than the own one, and a negative closest."""
    vectors = unit(0, 20, 10, 5, 120)
    both = np.array([[0, 1, 4], [0, 2, 4]])
    assert retrieval(vectors, both, 20.0).ranks.tolist() == [1, 1]
    hard = np.array([[0, 1, 3], [0, 2, 4]])
    assert retrieval(vectors, hard, 20.0).ranks.tolist() == [2, 2]
    itself = np.array([[0, 1, 0], [4, 2, 3]])  # an anchor among the candidates
    assert retrieval(vectors, itself, 20.0).ranks.tolist() == [3, 2]


def test_equal_vectors_count_against_the_positive() -> None:
    """Give all texts one vector, by which nothing is found."""
    vectors = unit(*[45] * 8)
    found = retrieval(vectors, np.arange(8).reshape(4, 2), 20.0)
    assert found.ranks.tolist() == [4] * 4
    assert found.loss == pytest.approx(np.log(4), rel=1e-12)


def test_cosent_is_its_plain_definition() -> None:
    rng = np.random.default_rng(0)
    scores, cosines = rng.integers(0, 4, 30).astype(float), rng.uniform(-1, 1, 30)
    total = 1.0
    for i in range(30):
        for j in range(30):
            if scores[i] > scores[j]:
                total += np.exp(20 * (cosines[j] - cosines[i]))
    assert cosent(scores, cosines, 20.0) == pytest.approx(np.log(total), rel=1e-12)
    assert cosent(np.ones(5), cosines[:5], 20.0) == 0


def test_correlations_of_cosines_with_scores() -> None:
    found = ScoreEvaluation(np.array([0.0, 1, 2, 3]), np.array([-0.5, 0.1, 0.9, 0.8]), 20.0)
    numbers = found.numbers()
    assert numbers["spearman"] == pytest.approx(0.8) and numbers["examples"] == 4
    assert found.criterion() == pytest.approx(0.2)
    assert numbers["loss"] == pytest.approx(found.loss) and "val_pearson" in found.values()


def test_spearman_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats", reason="scipy is not installed")
    rng = np.random.default_rng(1)
    scores, cosines = rng.integers(0, 6, 200).astype(float), rng.uniform(-1, 1, 200)
    found = ScoreEvaluation(scores, cosines, 20.0).metrics()
    assert found["spearman"] == pytest.approx(stats.spearmanr(scores, cosines)[0], rel=1e-12)
    assert found["pearson"] == pytest.approx(stats.pearsonr(scores, cosines)[0], rel=1e-12)
