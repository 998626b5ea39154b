"""Exact match and F1 of answers: cases of the official script, computed by hand."""

from __future__ import annotations

import pytest

from minillm.metrics.answers import best, exact_match, f1, normalized


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat's-hat, a.", "catshat"),
        ("U.S.A.", "usa"),
        ("a-the-b", "atheb"),  # punctuation goes before articles
        ("an\u00a0apple", "apple"),
        ("\u201cIt\u2019s\u201d \u2013 so", "\u201cit\u2019s\u201d \u2013 so"),
        ("  the   theatre\tof\nan age ", "theatre of age"),
        ("", ""),
        ("The", ""),
    ],
)
def test_normalized(text: str, expected: str) -> None:
    assert normalized(text) == expected


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("to to to be", "to be or not to be", 0.6),  # 3 of 4 and of 6: to twice, be once
        ("the red house", "red house", 1.0),
        ("house", "red house", 2 / 3),
        ("green", "red house", 0.0),
        ("", "red", 0.0),
        ("the", "", 1.0),
        ("a", "an", 1.0),
    ],
)
def test_f1(answer: str, gold: str, expected: float) -> None:
    assert f1(answer, gold) == pytest.approx(expected, abs=1e-15)
    assert f1(gold, answer) == pytest.approx(expected, abs=1e-15)


def test_the_best_of_several_right_answers() -> None:
    assert exact_match("the", "") == 1
    assert best("house", ["red house", "House!"]) == (1, 1)
    assert best("red", ["red house", "old red house"]) == (0, pytest.approx(2 / 3))
    # Those of different answers: an exact match is none of F1's, and each takes its own best.
    assert best("", ["red"]) == (0, 0)
    assert best("", []) == (1, 1) and best("red", []) == (0, 0)
    assert best("the", ["the", "red"]) == (0, 0)  # "the" normalizes to nothing and does not count
    assert best("", ["a"]) == (1, 1)
