"""Metrics of entities: by hand, by the package seqeval, and intervals by their definition."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minillm.data.conll import TagFields, read_sentences
from minillm.data.tags import spans_of, types_of
from minillm.tasks.tag_metrics import (
    READERS,
    TagEvaluation,
    counts_of,
    intervals,
    macro,
    micro,
    scores,
)

WNUT = Path("/work/shared/data/wnut17")


def evaluation(actual: list[list[str]], predicted: list[list[str]]) -> TagEvaluation:
    types = types_of(tag for tags in (*actual, *predicted) for tag in tags)
    rows = [
        [counts_of(spans_of(a), read(p), types) for read in READERS.values()]
        for a, p in zip(actual, predicted, strict=True)
    ]
    return TagEvaluation(0.0, 0.0, 0, types, np.array(rows))


def test_counts_by_hand() -> None:
    """Find one of two persons, no place but one with a wrong end, and a ship that is none."""
    actual = [["B-p", "I-p", "O", "B-l", "I-l"], ["B-p", "O", "O"]]
    guess = [["B-p", "I-p", "O", "B-l", "O"], ["O", "I-s", "O"]]
    found = evaluation(actual, guess)
    assert found.types == ["l", "p", "s"]
    assert found.counts[0].tolist() == [[0, 1, 1], [1, 1, 2], [0, 1, 0]]
    assert found.counts[1].tolist() == [[0, 1, 1], [1, 1, 2], [0, 0, 0]]
    np.testing.assert_allclose(micro(found.counts[0]), [1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(micro(found.counts[1]), [1 / 2, 1 / 3, 2 / 5])
    np.testing.assert_allclose(macro(found.counts[0]), [1 / 3, 1 / 6, 2 / 9])
    np.testing.assert_allclose(macro(found.counts[1]), [1 / 2, 1 / 4, 1 / 3])
    numbers = found.numbers()
    assert numbers["types"]["p"] == dict(precision=1, recall=0.5, f1=2 / 3, entities=2)
    assert numbers["strict"]["f1"] == pytest.approx(2 / 5) and numbers["entities"] == 3
    assert found.criterion() == pytest.approx(2 / 3)


def test_nothing_found_is_zero() -> None:
    assert scores(np.zeros((2, 3))).tolist() == [[0, 0, 0]] * 2
    assert macro(np.zeros((2, 3))).tolist() == [0, 0, 0]


@pytest.fixture(scope="module")
def seqeval() -> Any:
    return pytest.importorskip("seqeval.metrics", reason="the package seqeval is not installed")


def by_seqeval(seqeval: Any, actual: Any, predicted: Any, strict: bool) -> dict[str, float]:
    from seqeval.scheme import IOB2

    more = dict(mode="strict", scheme=IOB2) if strict else {}
    return {
        f"{name}{suffix}": float(
            getattr(seqeval, f"{name}_score")(
                actual, predicted, average=average, zero_division=0, **more
            )
        )
        for suffix, average in (("", "micro"), ("_macro", "macro"))
        for name in ("precision", "recall", "f1")
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("mode", READERS)
def test_scores_are_those_of_seqeval(seqeval: Any, mode: str) -> None:
    """Score random tags in valid and invalid order."""
    rng = np.random.default_rng(3)
    labels = ["O", "O", "B-x", "I-x", "B-y", "I-y", "B-z", "I-z"]
    for number in range(40):
        sizes = rng.integers(1, 12, 5)
        guess = [rng.choice(labels, n).tolist() for n in sizes]
        actual = [
            [t if rng.random() < 0.6 else str(rng.choice(labels)) for t in tags] for tags in guess
        ]
        if mode == "strict":  # the actual ones are always valid in minillm
            actual = [valid(tags) for tags in actual]
        if number % 2:
            guess = [valid(tags) for tags in guess]
        found = evaluation(actual, guess)
        expected = by_seqeval(seqeval, actual, guess, mode == "strict")
        assert found._metrics(list(READERS).index(mode)) == pytest.approx(expected, abs=1e-12)


def valid(tags: list[str]) -> list[str]:
    """Return tags in IOB2: B where an I begins an entity."""
    out = []
    for before, tag in zip(["O", *tags], tags, strict=False):
        begins = tag.startswith("I-") and before[2:] != tag[2:]
        out.append(f"B{tag[1:]}" if begins else tag)
    return out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.skipif(not WNUT.is_dir(), reason="WNUT17 is not on this machine")
def test_scores_on_wnut17_are_those_of_seqeval(seqeval: Any) -> None:
    """Score guesses that change each tag of the development set in one of five cases."""
    actual = [list(s.tags) for s in read_sentences(str(WNUT / "dev.conll"), TagFields())]
    assert len(actual) == 1009
    assert len(read_sentences(str(WNUT / "train.conll"), TagFields())) == 3394
    rng, labels = np.random.default_rng(0), sorted({t for tags in actual for t in tags})
    guess = [
        [t if rng.random() < 0.8 else str(rng.choice(labels)) for t in tags] for tags in actual
    ]
    found = evaluation(actual, guess)
    for mode, strict in enumerate((False, True)):
        expected = by_seqeval(seqeval, actual, guess, strict)
        assert found._metrics(mode) == pytest.approx(expected, abs=1e-12)
    report = seqeval.classification_report(actual, guess, output_dict=True)
    for type_, expected in found.numbers()["types"].items():
        for name, theirs in (("precision", "precision"), ("recall", "recall"), ("f1", "f1-score")):
            assert expected[name] == pytest.approx(report[type_][theirs], abs=1e-12)


def test_intervals_are_those_of_sentences_drawn_again() -> None:
    """Draw 200 sentences again 2,000 times by a plain loop; ends scatter by about 0.004."""
    rng = np.random.default_rng(5)
    actual = rng.integers(0, 4, (200, 2)).astype(float)
    predicted = rng.integers(0, 4, (200, 2)).astype(float)
    right = np.minimum(rng.integers(0, 4, (200, 2)), np.minimum(actual, predicted))
    rows = np.stack([right, predicted, actual], -1)
    found, again = intervals(rows), []
    for _ in range(2000):
        some = rows[rng.integers(0, 200, 200)].sum((0, 1))
        again.append(2 * some[0] / (some[1] + some[2]))
    low, high = np.quantile(again, [0.025, 0.975])
    assert abs(found["f1_95"][0] - low) < 0.01 and abs(found["f1_95"][1] - high) < 0.01
