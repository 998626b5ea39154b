"""Windows of contexts: cuts, who judges a token, and places of answers in rows and in the text."""

from __future__ import annotations

import numpy as np
import pytest

from minillm.base.errors import ConfigError
from minillm.data.documents import SpecialTokenizer
from minillm.data.squad import Answer, Question
from minillm.data.tokenizers import ByteTokenizer, IdTokenizer, Tokenizer, make_tokenizer
from minillm.params.where import Where
from minillm.tasks.answer_metrics import Rule, cut_out
from minillm.tasks.spans import best_of_questions, best_of_rows
from minillm.tasks.windows import QuestionEncoder, cut, owners

CLS, SEP = 257, 258


def encoder(context: int, stride: int | None, base: Tokenizer | None = None) -> QuestionEncoder:
    return QuestionEncoder(SpecialTokenizer(base or ByteTokenizer(), False), context, stride)


def test_cuts_cover_all_tokens() -> None:
    assert cut(10, 4, 2) == [(0, 4), (2, 4), (4, 4), (6, 4)]
    assert cut(9, 4, 2) == [(0, 4), (2, 4), (4, 4), (6, 3)]
    assert cut(9, 4, 100) == [(0, 4), (4, 4), (8, 1)]  # no token is left out
    assert cut(4, 4, 1) == [(0, 4)] and cut(0, 4, 1) == [(0, 0)]
    assert encoder(300, None).stride == 128 and encoder(100, None).stride == 50


@pytest.mark.parametrize(("number", "most", "stride"), [(50, 10, 4), (33, 8, 8), (40, 12, 1)])
def test_each_token_is_judged_where_it_has_the_most_context(
    number: int, most: int, stride: int
) -> None:
    windows = cut(number, most, stride)
    found = owners(windows, number)
    for token in range(number):
        context = [
            min(token - first, first + size - 1 - token) + 0.01 * size
            if first <= token < first + size
            else -1.0
            for first, size in windows
        ]
        judges = [i for i, (start, end) in enumerate(found) if start <= token < end]
        assert judges == [int(np.argmax(context))]


def test_rows_and_answers_in_several_windows() -> None:
    """Cut 20 letters into windows of 9, 4 apart: "hij" lies whole in the second and the third."""
    context = "abcdefghijklmnopqrst"
    asked = Question("1", "x?", context, (Answer("hij", 7), Answer("a", 0)))
    rows = encoder(14, 4).encode([asked, Question("2", "y", "ab")], "the test")
    assert [(w.first, w.size) for w in rows.windows[:4]] == [(0, 9), (4, 9), (8, 9), (12, 8)]
    assert [w.span for w in rows.windows] == [(0, 0), (7, 9), (0, 0), (0, 0), (0, 0)]
    rows = encoder(14, 2).encode([asked], "the test")
    assert [(w.first, w.span) for w in rows.windows if w.span != (0, 0)] == [
        (2, (9, 11)),
        (4, (7, 9)),
        (6, (5, 7)),
    ]
    batch = rows.batch(np.array([1, 0]), 14, Where(0, np.arange(2)), {})
    tokens = [CLS, *b"x?", SEP, *b"cdefghijk", SEP]
    assert batch.arrays["tokens"][0].tolist() == tokens and batch.limits is None
    assert batch.arrays["types"][0].tolist() == [0] * 4 + [1] * 10
    assert batch.arrays["spans"].tolist() == [[9, 11], [0, 0]]
    start, end = rows.windows[1].owned
    assert batch.arrays["places"][0].tolist() == [4, 13, start - 2 + 4, end - 2 + 4]
    short = encoder(14, 4).encode([Question("2", "y", "ab")], "the test")
    assert rows.windows[0].owned[0] == 0 and short.windows[0].owned == (0, 2)


def test_long_questions_are_cut_and_counted() -> None:
    found = encoder(13, 4)
    rows = found.encode([Question("1", "abcdefgh", "xyz")], "the test")
    assert rows.heads[0].tolist() == [CLS, *b"abcde", SEP] and found.num_cut == 1
    with pytest.raises(ConfigError, match="question '1' of the test has 8 tokens, more than half"):
        found.encode([Question("1", "abcdefgh", "xyz")], "the test", truncate=False)


TEXT = "In I\u0307zmir, E\u0301va met Zo\u00eb \U0001f3e0 at the Caf\u00c9."


@pytest.mark.parametrize("kind", ["wordpiece:60", "bpe:300", "char", "byte"])
@pytest.mark.parametrize(
    "answer", ["I\u0307zmir", "E\u0301va", "Zo\u00eb", "the Caf\u00c9", "\u0301"]
)
def test_answers_are_cut_out_of_the_text_as_written(kind: str, answer: str) -> None:
    """Go from characters to tokens and back, where lower case and accents change lengths."""
    start = TEXT.index(answer)
    made = make_tokenizer(kind, TEXT * 3)
    asked = Question("1", "at", TEXT, (Answer(answer, start),))
    if kind.startswith("wordpiece") and answer == "\u0301":
        return  # an accent alone may have no token
    rows = encoder(128, None, made).encode([asked], "the test")
    (window,), head = rows.windows, int(rows.begins[0])
    tokens = [place - head for place in window.span]
    found, first, end = cut_out(TEXT, *rows.characters(0, *tokens))
    assert first <= start and end >= start + len(answer) and answer in found
    if kind in ("char", "byte"):
        assert (found, first, end) == (answer, start, start + len(answer))
    assert len(found) <= len(answer) + 1  # a piece may hold a mark that belongs to its letter


def test_tokenizers_without_places_and_answers_without_tokens() -> None:
    with pytest.raises(ConfigError, match="ids does not say which characters"):
        encoder(16, 4, IdTokenizer(50)).encode([Question("1", "1", "2")], "the test")
    made = make_tokenizer("wordpiece:60", "some words here")
    asked = Question("7", "some", "some \u200b words", (Answer("\u200b", 5),))
    with pytest.raises(ConfigError, match=r"question '7' of the test .* keeps nothing"):
        encoder(16, 4, made).encode([asked], "the test")


def test_best_spans_against_a_search(seed: int = 3) -> None:
    """Compare with all pairs of positions, of which many have equal scores."""
    rng = np.random.default_rng(seed)
    for length, most, number in ((9, 3, 1), (12, 30, 4), (12, 2, 40), (8, 1, 3)):
        scores = rng.integers(-3, 4, (20, length, 2)).astype(float)
        begin = rng.integers(1, 4, 20)
        end = rng.integers(begin, length + 1)
        own = rng.integers(begin, end + 1)
        own_end = rng.integers(own, end + 1)
        places = np.stack([begin, end, own, own_end], 1)
        found = best_of_rows(scores, places, most, number)
        assert found.shape == (20, 3 * number + 1)
        for row in range(20):
            pairs = [
                (-scores[row, s, 0] - scores[row, e, 1], s, e)
                for s in range(own[row], own_end[row])
                for e in range(s, min(s + most, end[row]))
            ]
            expected = [(-score, s, e) for score, s, e in sorted(pairs)[:number]]
            spans = found[row, :-1].reshape(-1, 3)
            assert [tuple(each) for each in spans[: len(expected)]] == expected
            assert (spans[len(expected) :, 0] == -np.inf).all()
            assert found[row, -1] == scores[row, 0].sum()


def test_windows_are_merged_and_no_answer_takes_the_lowest() -> None:
    questions = [Question("1", "x", "abcdefgh"), Question("2", "x", "ab"), Question("3", "x", "")]
    rows = encoder(9, 3).encode(questions, "the test")
    assert rows.questions.tolist() == [0, 0, 1, 2] and rows.firsts.tolist() == [0, 3, 0, 0]
    none = -np.inf
    values = np.array(
        [
            [1.0, 3, 4, none, none, none, 7.0],
            [5.0, 3, 5, 0.5, 4, 4, 2.0],
            [2.0, 3, 4, none, none, none, -1.0],
            [none, none, none, none, none, none, 4.0],
        ]
    )
    found = best_of_questions(values, rows, 2)
    assert found[0].tolist() == [5, 3, 6, 1, 0, 2, 2]  # characters, the end behind the last
    assert found[1].tolist() == [2, 0, 2, none, none, none, -1]
    always, careful = Rule(30, None), Rule(30, 0.0)
    assert always.answer("abcdefgh", found[0]) == ("def", 3, 6)
    assert careful.answer("abcdefgh", found[0]) == ("def", 3, 6)
    assert Rule(30, -3.5).answer("abcdefgh", found[0])[0] == ""
    assert always.answer("", found[2]) == ("", 0, 0)
    assert cut_out("a bc d", 1, 5) == ("bc", 2, 4)
