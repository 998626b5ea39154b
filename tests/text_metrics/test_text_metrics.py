"""Metrics of texts: worked examples, plain definitions, the reference packages, intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from text_metrics.corpora import ODD, SMALL, drawn

from minillm.metrics import protocol
from minillm.metrics.bleu import BLEU
from minillm.metrics.bleu_tokenizers import TOKENIZERS
from minillm.metrics.chrf import ChrF, split_words
from minillm.metrics.ngrams import matches, ngrams
from minillm.metrics.protocol import RESAMPLES, TextMetric, numbers_of, statistics_of
from minillm.metrics.rouge import ROUGE, common_length, words


def rows_of(metric: TextMetric, texts: Sequence[str], *references: Sequence[str]) -> np.ndarray:
    found = [
        statistics_of([metric], text, list(others))
        for text, *others in zip(texts, *references, strict=True)
    ]
    return np.array(found, np.float64)


def scored(metric: TextMetric, texts: Sequence[str], *references: Sequence[str]) -> dict[str, Any]:
    scores = metric.scores(rows_of(metric, texts, *references).sum(0))
    return {name: float(value) for name, value in scores.items()}


def test_bleu_of_a_worked_example() -> None:
    found = scored(BLEU(), *SMALL)
    assert found["bleu"] == pytest.approx(38.662527, abs=1e-6)
    precisions = [found[f"bleu_precision_{n}"] for n in range(1, 5)]
    assert precisions == pytest.approx([80, 50, 100 / 3, 25], abs=1e-12)
    assert found["bleu_brevity_penalty"] == pytest.approx(math.exp(1 - 11 / 10), abs=1e-15)
    assert found["bleu_brevity_penalty"] == pytest.approx(0.904837, abs=1e-6)


def test_bleu_of_a_corpus_is_no_mean_over_sentences_or_ranks() -> None:
    """Tell the corpus' brevity from that of sentences, and summed counts from averaged scores.

    One text is a word short, the other a word long, so the corpus is as long as its references.
    """
    texts = ["a b c d e f g h", "a b c d e f g h i j"]
    references = [["a b c d e f g h x", "a b c d e f g h i"][i] for i in range(2)]
    found = scored(BLEU("none"), texts, references)
    assert found["bleu_brevity_penalty"] == 1.0
    # Matches and n-grams by hand: the second text has one word, and n-grams with it, too many.
    shares = [Fraction(17, 18), Fraction(15, 16), Fraction(13, 14), Fraction(11, 12)]
    expected = 100 * math.prod(map(float, shares)) ** 0.25
    assert found["bleu"] == pytest.approx(expected, rel=1e-14)
    alone = [scored(BLEU("none"), [t], [r]) for t, r in zip(texts, references, strict=True)]
    mean = np.mean([each["bleu"] for each in alone])
    by_sentence = np.mean([each["bleu_brevity_penalty"] for each in alone]) * expected
    assert abs(found["bleu"] - mean) > 0.5 and abs(found["bleu"] - by_sentence) > 3
    halves = [
        rows_of(BLEU("none"), [t], [r]).sum(0) for t, r in zip(texts, references, strict=True)
    ]
    averaged = np.mean([half[2:6] / half[6:10] for half in halves], 0)
    assert abs(found["bleu"] - 100 * np.prod(averaged) ** 0.25) > 0.05


def test_brevity_by_sentence_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plant a penalty that a long text cannot make up for."""
    original = BLEU.statistics

    def by_sentence(self: BLEU, hypothesis: str, references: Sequence[str]) -> list[float]:
        length, closest, *counts = original(self, hypothesis, references)
        return [length, max(length, closest), *counts]

    monkeypatch.setattr(BLEU, "statistics", by_sentence)
    with pytest.raises(AssertionError):
        test_bleu_of_a_corpus_is_no_mean_over_sentences_or_ranks()


def test_bleu_of_few_words_is_zero_and_of_no_match_too() -> None:
    assert scored(BLEU(), ["two words"], ["two words"])["bleu"] == 0.0
    assert scored(BLEU(), ["a b c d e"], ["v w x y z"])["bleu"] == 0.0
    assert scored(BLEU(), [""], ["v w x y z"])["bleu"] == 0.0
    assert scored(BLEU(), ["a b c d"], ["a b c d"])["bleu"] == pytest.approx(100, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It's 3.14 and 1,000-2,000 (ok).", "It's 3.14 and 1,000 - 2,000 ( ok ) ."),
        ("&quot;a &amp; b&quot;", '" a & b "'),
        ("„so“ – 5", "„so“ – 5"),
        ("foo-\nbar", "foobar"),
        ("foo-bar\nbaz", "foo-bar baz"),
    ],
)
def test_tokens_of_13a(text: str, expected: str) -> None:
    assert " ".join(TOKENIZERS["13a"](text)) == expected


def test_tokens_of_other_kinds() -> None:
    assert " ".join(TOKENIZERS["intl"]("„so“ 3,5 € a-b 1999.")) == "„ so “ 3,5 € a - b 1999."
    assert TOKENIZERS["char"]("ab  c") == ["a", "b", "c"]
    assert TOKENIZERS["none"]("ab,  c.") == ["ab,", "c."]


def test_chrf_of_a_worked_example() -> None:
    """Check "abc" against "abd": of orders 1 to 3 two, one and no n-grams match."""
    precision = recall = (2 / 3 + 1 / 2 + 0 / 1) / 3
    expected = 100 * 5 * precision * recall / (4 * precision + recall)
    assert scored(ChrF(), ["abc"], ["ab d"])["chrf"] == pytest.approx(expected, rel=1e-14)
    # With words, of orders 1 and 2: "ab c" has one of two words and no pair in "ab d".
    precision = (2 / 3 + 1 / 2 + 0 / 1 + 1 / 2 + 0 / 1) / 5
    found = scored(ChrF(words=2), ["ab c"], ["ab d"])["chrf"]
    assert found == pytest.approx(100 * precision, rel=1e-14)
    assert split_words("(hi) a, 'b !") == ["(hi", ")", "a", ",", "'", "b", "!"]


def test_chrf_counts_recall_twice() -> None:
    short, long = (scored(ChrF(), [t], [r])["chrf"] for t, r in (("ab", "abc"), ("abc", "ab")))
    # Orders that only one side has do not count: 1 and 2 do.
    for found, precision, recall in (
        (short, 1, (2 / 3 + 1 / 2) / 2),
        (long, (2 / 3 + 1 / 2) / 2, 1),
    ):
        expected = 100 * 5 * precision * recall / (4 * precision + recall)
        assert found == pytest.approx(expected, rel=1e-14)


def test_rouge_of_worked_examples() -> None:
    """Check an example of Lin 2004: "police kill the gunman" has the words, not the order."""
    reference = "police killed the gunman"
    first, second = (
        scored(ROUGE(), [text], [reference])
        for text in ("police kill the gunman", "The gunman kill police!")
    )
    for found, length, pairs in ((first, 3, 1), (second, 2, 1)):
        assert found["rougeL"] == found["rougeL_recall"] == length / 4
        assert found["rouge1_precision"] == 3 / 4 and found["rouge2"] == pytest.approx(pairs / 3)
    found = scored(ROUGE(), ["a b", "a"], ["a b c d", "z"])
    assert found["rouge1_recall"] == 1 / 4 and found["rouge1_precision"] == 1 / 2
    assert found["rouge1"] == pytest.approx((2 / 3) / 2)  # the mean of F, not F of the means
    assert scored(ROUGE(), [""], [""])["rougeL"] == 0.0
    assert words("Don't run—3.5 Öl") == ["don", "t", "run", "3", "5", "l"]


def test_common_length_is_that_of_the_table() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        a, b = (list(rng.choice(list("abcd"), rng.integers(0, 12))) for _ in range(2))
        table = np.zeros((len(a) + 1, len(b) + 1), int)
        for i, x in enumerate(a):
            for j, y in enumerate(b):
                longer = max(table[i, j + 1], table[i + 1, j])
                table[i + 1, j + 1] = table[i, j] + 1 if x == y else longer
        assert common_length(a, b) == table[-1, -1]


@pytest.mark.parametrize("lowercase", [False, True])
@pytest.mark.parametrize("tokenizer", ["13a", "none", "char", "intl"])
def test_bleu_is_that_of_sacrebleu(tokenizer: str, lowercase: bool) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the oracle of BLEU")
    texts, *both = drawn()
    theirs = sacrebleu.BLEU(tokenize=tokenizer, lowercase=lowercase)
    for references in (both[:1], both):
        own = BLEU(tokenizer, lowercase, len(references))
        expected = theirs.corpus_score(texts, references)
        found = scored(own, texts, *references)
        assert found["bleu"] == pytest.approx(expected.score, rel=1e-12)
        assert found["bleu_brevity_penalty"] == pytest.approx(expected.bp, rel=1e-12)
        for n, precision in enumerate(expected.precisions, 1):
            assert found[f"bleu_precision_{n}"] == pytest.approx(precision, rel=1e-12)
        signature, _, version = str(theirs.get_signature()).rpartition("|")
        assert version.startswith("version:") and own.signature["bleu_signature"] == signature
        for text, *others in zip(texts, *references, strict=True):  # smoothing, in the extreme
            alone = theirs.corpus_score([text], [[other] for other in others]).score
            found = scored(own, [text], *[[other] for other in others])
            assert found["bleu"] == pytest.approx(alone, rel=1e-12, abs=1e-12)


@pytest.mark.parametrize("kind", ["13a", "intl", "char"])
def test_tokens_are_those_of_sacrebleu(kind: str) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the oracle of the tokenizers")
    theirs, rng = sacrebleu.BLEU(tokenize=kind).tokenizer, np.random.default_rng(1)
    letters = [*"ab1 2.,-'!€“&;/\n", "&quot;", "é", "-\n", "Ⅷ", "£", "，"]
    texts = [*ODD, *("".join(rng.choice(letters, rng.integers(1, 20))) for _ in range(2000))]
    for text in texts:
        assert TOKENIZERS[kind](text) == theirs(text).split()


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("lowercase", [False, True])
def test_chrf_is_that_of_sacrebleu(order: int, lowercase: bool) -> None:
    sacrebleu = pytest.importorskip("sacrebleu", reason="the oracle of chrF")
    texts, *both = drawn()
    theirs = sacrebleu.CHRF(word_order=order, lowercase=lowercase)
    for references in (both[:1], both):
        own = ChrF(order, lowercase, len(references))
        expected = theirs.corpus_score(texts, references).score
        assert scored(own, texts, *references)["chrf"] == pytest.approx(expected, rel=1e-12)
        signature = str(theirs.get_signature()).rpartition("|")[0]
        assert own.signature["chrf_signature"] == signature


def test_rouge_is_that_of_rouge_score() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer", reason="the oracle of ROUGE")
    kinds = ["rouge1", "rouge2", "rougeL"]
    theirs, (texts, *both) = scorer.RougeScorer(kinds, use_stemmer=False), drawn()
    for references in (both[:1], both):
        each = [
            theirs.score_multi(others, text)
            for text, *others in zip(texts, *references, strict=True)
        ]
        found = scored(ROUGE(), texts, *references)
        for kind in kinds:
            for part, name in (("", "fmeasure"), ("_precision",) * 2, ("_recall",) * 2):
                expected = np.mean([getattr(one[kind], name.strip("_")) for one in each])
                assert found[kind + part] == pytest.approx(expected, rel=1e-12)


METRICS: tuple[TextMetric, ...] = (BLEU(), ChrF(2), ROUGE())


def test_sums_of_parts_are_those_of_the_whole() -> None:
    texts, references, _ = drawn()
    rows = np.array(
        [statistics_of(METRICS, t, [r]) for t, r in zip(texts, references, strict=True)]
    )
    whole, parts = numbers_of(METRICS, rows), [rows[rank::3] for rank in range(3)]
    summed = sum(part.sum(0) for part in parts)
    scores = BLEU().scores(summed[: BLEU.width])
    assert float(scores["bleu"]) == whole["bleu"]
    assert rows.shape[1] == protocol.num_statistics(METRICS)
    averaged = np.mean([float(BLEU().scores(p.sum(0)[: BLEU.width])["bleu"]) for p in parts])
    assert abs(averaged - whole["bleu"]) > 1e-3


def test_intervals_are_those_of_sentences_drawn_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ends of intervals from 1,000 resamples scatter by some percent of their width."""
    texts, references, _ = drawn(200)
    rows = np.array(
        [statistics_of(METRICS, t, [r]) for t, r in zip(texts, references, strict=True)]
    )
    found, rng = numbers_of(METRICS, rows), np.random.default_rng(5)
    again: dict[str, list[float]] = {name: [] for name in ("bleu", "chrf", "rouge1", "rougeL")}
    for _ in range(RESAMPLES):
        sums, first = rows[rng.integers(0, len(rows), len(rows))].sum(0), 0
        for metric in METRICS:
            scores = metric.scores(sums[first : first + metric.width])
            first += metric.width
            for name in again.keys() & scores.keys():
                again[name].append(float(scores[name]))
    for name, values in again.items():
        low, high = np.quantile(values, [0.025, 0.975])
        own = found[f"{name}_95"]
        assert own[0] < found[name] < own[1]
        assert abs(own[0] - low) < 0.2 * (high - low) > abs(own[1] - high)
    monkeypatch.setattr(protocol, "MOST_DRAWN", 7 * len(rows))  # the same in portions
    portions = numbers_of(METRICS, rows)
    for name in again:
        np.testing.assert_allclose(portions[f"{name}_95"], found[f"{name}_95"], rtol=1e-12)


def test_counts_are_the_same_for_equal_words_of_any_type() -> None:
    assert ngrams(["a", "b", "a", "b"], 2) == Counter({("a", "b"): 2, ("b", "a"): 1})
    assert ngrams("abab", 2) == Counter({"ab": 2, "ba": 1}) and not ngrams("a", 2)
    assert matches(ngrams("aab", 1), ngrams("aaac", 1)) == 2
