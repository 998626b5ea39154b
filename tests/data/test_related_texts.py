"""Texts that belong together: every format, columns that may lack, bad rows, generated deals."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minillm.base.errors import ConfigError
from minillm.data.related_texts import RelatedFields, read_related, to_train_on, translated

USUAL = RelatedFields()


def table(path: Path, *lines: str) -> str:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return str(path)


def test_formats_of_pairs_triplets_and_scores(tmp_path: Path) -> None:
    pairs = read_related(table(tmp_path / "a.tsv", "positive\tanchor", "b\ta", "d\tc"), USUAL)
    assert [(each.texts, each.score, each.line) for each in pairs] == [
        (("a", "b"), None, 2),
        (("c", "d"), None, 3),
    ]
    name = table(tmp_path / "a.csv", "anchor,positive,negative", '"a, a",b,n', "c,d,m")
    assert [each.texts for each in read_related(name, USUAL)] == [
        ("a, a", "b", "n"),
        ("c", "d", "m"),
    ]
    name = table(tmp_path / "b.tsv", "sentence1\tsentence2\tscore", "a\tb\t4.5", "c\td\t0")
    assert [each.score for each in read_related(name, USUAL)] == [4.5, 0.0]
    rows = [{"query": "a", "answer": "b", "score": 1}, {"query": "c", "answer": "d", "score": 2.5}]
    name = table(tmp_path / "a.jsonl", *map(json.dumps, rows))
    assert [each.score for each in read_related(name, USUAL)] == [1.0, 2.5]


def test_columns_by_number_and_by_name(tmp_path: Path) -> None:
    name = table(tmp_path / "a.tsv", "x\ta\tb\t0.5", "y\tc\td\t0.1")
    found = read_related(name, RelatedFields("2", "3"))
    assert [(each.texts, each.score) for each in found] == [(("a", "b"), None), (("c", "d"), None)]
    found = read_related(name, RelatedFields("2", "3", None, "4"))
    assert [(each.texts, each.score) for each in found] == [(("a", "b"), 0.5), (("c", "d"), 0.1)]
    name = table(tmp_path / "b.tsv", "p\tq\tr", "a\tb\tn")
    assert read_related(name, RelatedFields("p", "q", "r"))[0].texts == ("a", "b", "n")


def test_lines_that_lack_a_field_are_named(tmp_path: Path) -> None:
    rows = [{"query": "a", "answer": "b", "score": 1, "negative": "n"}]
    for lack in ("score", "negative"):
        more = [{key: value for key, value in rows[0].items() if key != lack}]
        name = table(tmp_path / f"{lack}.jsonl", *map(json.dumps, rows + more))
        with pytest.raises(ConfigError, match=f"line 2 of .*{lack}.* null"):
            read_related(name, USUAL)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (["anchor\tpositive", "a\tb", "c\t "], ["line 3 of", "no text as positive"]),
        (["anchor\tpositive\tnegative", "a\tb\tn", "c\td\t"], ["line 3", "no text as negative"]),
        (["anchor\tpositive\tscore", "a\tb\t1", "c\td\thigh"], ["line 3", '"high"', "no number"]),
        (["anchor\tpositive\tscore", "a\tb\tnan"], ["line 2", "no number"]),
        (["anchor\tother", "a\tb"], ["line 1", "--pair-field"]),
        (["anchor\tpositive", "a\tb\tc"], ["line 2", "3 fields"]),
    ],
)
def test_bad_rows_are_named(lines: list[str], words: list[str], tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as error:
        read_related(table(tmp_path / "bad.tsv", *lines), USUAL)
    assert all(word in str(error.value) for word in ["bad.tsv", *words]), error.value


def test_scores_choose_what_belongs_together(tmp_path: Path) -> None:
    name = table(tmp_path / "a.tsv", "anchor\tpositive\tscore", "a\tb\t5", "c\td\t2", "e\tf\t4")
    found = read_related(name, USUAL)
    assert [each.texts for each in to_train_on(found, 4, name)] == [("a", "b"), ("e", "f")]
    with pytest.raises(ConfigError, match=r"has scores.*--min-score"):
        to_train_on(found, None, name)
    with pytest.raises(ConfigError, match=r"one positive alone.*at least 5"):
        to_train_on(found, 5, name)
    with pytest.raises(ConfigError, match=r"no pair.*at least 6"):
        to_train_on(found, 6, name)
    with pytest.raises(ConfigError, match="--min-score 1 needs scores"):
        to_train_on([each._replace(score=None) for each in found], 1, name)


def test_translations_have_their_rule() -> None:
    found = translated()
    assert len({each.texts for each in found}) == len(found) == 10_000
    turned, alike = str.maketrans("aeiou", "eioua"), 0
    for each in found:
        first, second = (text.split() for text in each.texts)
        assert [word.translate(turned) for word in first] == second[::-1]
        alike += not {*first}.isdisjoint(second)
    assert alike < 0.02 * len(found)  # they have a word in common
