"""Files of tagged words: CoNLL columns and JSON lines, and their errors by file and line."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from minillm.base.errors import ConfigError
from minillm.data.conll import Sentence, TagFields, cut, read_sentences, read_untagged
from minillm.data.journeys import journeys
from minillm.data.labelled import split
from minillm.data.tags import spans_of

USUAL = TagFields(None, None)
WANTED = [
    Sentence(("in", "New", "Bath"), ("O", "B-l", "I-l"), 1),
    Sentence(("Ann",), ("B-p",), 5),
    Sentence(("#x", "."), ("O", "O"), 8),
]


@pytest.mark.parametrize("separator", ["", "\t", " ", " \t "])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_sentences_end_at_empty_and_at_blank_lines(
    separator: str, end: str, tmp_path: Path
) -> None:
    """WNUT17 separates its sentences by lines with a tab."""
    rows = ["in\tO", "New\tB-l", "Bath\tI-l", separator, "Ann\tB-p", separator, separator]
    rows += ["#x\tO", ".\tO "]
    for content in (end.join(rows), end.join([*rows, separator, ""])):
        (tmp_path / "a.conll").write_bytes(content.encode())
        assert read_sentences(str(tmp_path / "a.conll"), USUAL) == WANTED


def test_columns_by_number_documents_and_comments(tmp_path: Path) -> None:
    rows = ["-DOCSTART- -X- -X- O", "", "EU NNP B-NP I-ORG", "rejects VBZ  B-VP O", ""]
    rows += ["# NNP B-NP O", "", "-DOCSTART- -X- -X- O", "x y B-c B-ORG"]
    with gzip.open(tmp_path / "a.txt.gz", "wt") as file:
        file.write("\n".join(rows))
    name = str(tmp_path / "a.txt.gz")
    first, second, third = read_sentences(name, USUAL)
    assert first == Sentence(("EU", "rejects"), ("I-ORG", "O"), 3)
    assert second.tokens == ("#",) and third == Sentence(("x",), ("B-ORG",), 9)
    chunks = read_sentences(name, TagFields("2", "3"))[0]
    assert chunks == Sentence(("NNP", "VBZ"), ("B-NP", "B-VP"), 3)
    (tmp_path / "u.conllu").write_text("# id = 1\n1\tAnn\tB-p\n# a comment\n2\tsaw\tO\n")
    found = read_sentences(str(tmp_path / "u.conllu"), TagFields("2", None))
    assert found == [Sentence(("Ann", "saw"), ("B-p", "O"), 2)]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"tokens": ["in", "Bath"], "ner_tags": ["O", "S-l"], "id": 3}\n\n')
    assert read_sentences(str(path), USUAL) == [Sentence(("in", "Bath"), ("O", "S-l"), 1)]
    path.write_text('{"a": ["in"], "tokens": [], "b": ["O"]}\n')
    assert read_sentences(str(path), TagFields("a", "b"))[0].tokens == ("in",)


BAD = [
    ("a.conll", "", ["has no sentence"]),
    ("a.conll", "\t\n\n", ["has no sentence"]),
    ("a.conll", "in O\nBath\n", ["line 2 of", "1 column,", "the first has 2"]),
    ("a.conll", "in\n", ["line 1 of", "one column"]),
    ("a.conll", "in\tO\nrun\tVERB\n", ["line 2 of", "the tag 'VERB'", "--tag-field"]),
    ("a.conll", "in\tO\nrun\t\n", ["line 2 of", "1 column"]),
    ("a.conll", b"in\tO\n\xff\tO\n", ["line 2 of", "not UTF-8"]),
    ("a.jsonl", "", ["has no row"]),
    ("a.jsonl", "{}", ["line 1 of", "no field tokens or words"]),
    ("a.jsonl", '{"tokens": ["a"], "tags": []}', ["line 1 of", "1 word,", "0 tags"]),
    ("a.jsonl", '{"tokens": [], "tags": []}', ["line 1 of", "no word"]),
    ("a.jsonl", '{"tokens": ["a"], "tags": [3]}', ["line 1 of", "no list of tags", "[3]"]),
    ("a.jsonl", '{"tokens": "a b", "tags": ["O"]}', ["line 1 of", "no list of words"]),
    ("a.jsonl", '{"tokens": ["a"], "tags": ["b"]}', ["line 1 of", "the tag 'b'"]),
]


@pytest.mark.parametrize(("file", "content", "words"), BAD)
def test_bad_files_are_named_with_their_line(
    file: str, content: str | bytes, words: list[str], tmp_path: Path
) -> None:
    path = tmp_path / file
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as error:
        read_sentences(str(path), USUAL)
    assert all(word in str(error.value) for word in [file, *words]), error.value


@pytest.mark.parametrize("fields", [TagFields("3", None), TagFields("word", None)])
def test_columns_that_are_none(fields: TagFields, tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("in O\n")
    with pytest.raises(ConfigError, match=r"--token-field .* number from 1 to 2"):
        read_sentences(str(tmp_path / "a.conll"), fields)


def test_inputs_without_tags(tmp_path: Path) -> None:
    for name, content in {
        "a.txt": "Ann's in Bath.\n\n",
        "a.jsonl": '{"tokens": ["in", "Bath"]}\n{"text": "in Bath"}\n',
        "a.conll": "in\nBath\n\t\nAnn\n",
    }.items():
        (tmp_path / name).write_text(content)
    text, empty = read_untagged(str(tmp_path / "a.txt"), USUAL)
    assert text == cut("Ann's in Bath.") and empty.tokens == ()
    assert text.tokens == ("Ann", "'", "s", "in", "Bath", ".")
    assert text.starts == (0, 3, 4, 6, 9, 13)
    words, sentence = read_untagged(str(tmp_path / "a.jsonl"), USUAL)
    assert words == (None, ("in", "Bath"), ()) and sentence == cut("in Bath")
    columns = read_untagged(str(tmp_path / "a.conll"), TagFields(None, "4"))
    assert [each.tokens for each in columns] == [("in", "Bath"), ("Ann",)]


def test_the_words_around_decide_in_the_generated_journeys() -> None:
    """Recover every tag from the word before a name, or from a verb behind it."""
    before = dict.fromkeys(["in", "from", "to", "near"], "place")
    before |= dict.fromkeys(["for", "joined", "bought"], "company") | {"the": None}
    found = journeys()
    assert len(found) == len({each.tokens for each in found}) == 4000
    for each in found:
        tokens, spans, start = each.tokens, [], 0
        while start < len(tokens):
            end = start
            while tokens[end][0].isupper():
                end += 1
            if end > start:
                kind = before.get(tokens[start - 1] if start else "", "person")
                spans += [(kind, start, end)] if kind else []
            start = max(end, start + 1)
        assert spans == spans_of(each.tags), each
    names = {word for each in found for word in each.tokens if word[0].isupper()}
    assert len(names) > 300
    train, held_out = split(found)
    assert len(held_out) == 400 and not set(train) & set(held_out)
