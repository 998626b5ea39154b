"""Tables: every format gives the same rows, and errors name file and line."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path

import pytest

from minillm.base.errors import ConfigError
from minillm.data.conll import TagFields, read_sentences, read_untagged
from minillm.data.labelled import Fields, labels_of, read_examples, read_inputs, split
from minillm.data.tables import Column, Row, read_table

ROWS = [("plain", "1"), ('with "quotes", commas', "0"), ("ünï cödé", "1"), ("", "0")]
COLUMNS = [Column("--text-field", None, ("sentence", "text")), Column("--label", None, ("label",))]


def written(path: Path, rows: list[tuple[str, ...]]) -> str:
    """Write rows behind a column that nobody asks for, in the format of the name."""
    kind, made = path.name.split(".")[1], [("7", *row) for row in rows]
    head = ("index", "text", "label")
    if kind == "jsonl":
        content = "\n".join(json.dumps(dict(zip(head, row, strict=True))) for row in made)
    elif kind == "tsv":
        content = "".join("\t".join(row) + "\n" for row in (head, *made))
    else:
        with path.open("w", newline="", encoding="utf-8") as stream:
            csv.writer(stream).writerows([head, *made])
        content = path.read_text(encoding="utf-8")
    data = content.encode("utf-8-sig" if kind == "csv" else "utf-8")
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return str(path)


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl", "a.tsv.gz"])
def test_formats_hold_the_same(name: str, tmp_path: Path) -> None:
    found = read_table(written(tmp_path / name, ROWS), COLUMNS)
    first = 1 if "jsonl" in name else 2
    assert found == [Row(i, row) for i, row in enumerate(ROWS, first)]


def test_lines_are_those_of_the_file(tmp_path: Path) -> None:
    name = written(tmp_path / "a.csv", [("two\nlines", "1"), ("b", "0")])
    assert read_table(name, COLUMNS) == [Row(2, ("two\nlines", "1")), Row(4, ("b", "0"))]
    (tmp_path / "crlf.tsv").write_bytes(b"label\tsentence\r\n1\ta\r\n")
    assert read_table(str(tmp_path / "crlf.tsv"), COLUMNS) == [Row(2, ("a", "1"))]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv", "a.jsonl"])
def test_optional_columns_may_lack(name: str, tmp_path: Path) -> None:
    """Give None for one that is not there, its values if it is, and an error if it is asked for."""
    path, first = written(tmp_path / name, ROWS[:1]), 1 if "jsonl" in name else 2
    more = Column("--score", None, ("score",), optional=True)
    assert read_table(path, [*COLUMNS, more]) == [Row(first, (*ROWS[0], None))]
    more = Column("--score", None, ("index",), optional=True)
    assert read_table(path, [*COLUMNS, more]) == [Row(first, (*ROWS[0], "7"))]
    with pytest.raises(ConfigError, match=r"score.*--score"):
        read_table(path, [*COLUMNS, Column("--score", "score", (), optional=True)])


def test_columns_by_number_have_no_names(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("good\tx\nbad\ty\n")
    found = read_examples(str(tmp_path / "a.tsv"), Fields("1", None, "2"))
    assert [(each.texts, each.label, each.line) for each in found] == [
        (("good",), "x", 1),
        (("bad",), "y", 2),
    ]


def test_pairs_labels_and_lines_of_text(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"premise": "a", "hypothesis": "b", "label": label} for label in (10, 9, True, 10)]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = read_examples(str(path), Fields(None, None, None, True))
    assert [each.texts for each in found] == [("a", "b")] * 4
    labels = [each.label for each in found]
    assert labels_of(labels) == ["10", "9", "true"] and labels_of(labels[:2]) == ["9", "10"]
    (tmp_path / "lines.txt").write_text("a\n\nb\n")
    assert read_inputs(str(tmp_path / "lines.txt"), Fields(None, None, None)) == [
        ("a",),
        ("",),
        ("b",),
    ]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.csv", 'text,label\n"a,1\n', "line 2 of PATH is no CSV"),
        ("a.csv", "text,label\na,1,2\n", "line 2 of PATH has 3 fields, but the first line has 2"),
        ("a.tsv", "text\tlabel\na\t1\n\nb\t1\n", "line 3 of PATH is empty; remove it"),
        ("a.jsonl", '{"text": "a", "label": 1}\n{"text"', "line 2 of PATH is no JSON"),
        ("a.jsonl", "[1]\n", "line 1 of PATH is no JSON object"),
        ("a.jsonl", '{"text": "a"}\n', "line 1 of PATH has no field label or score, only 'text'"),
        ("a.jsonl", '{"text": "a", "label": null}\n', "line 1 of PATH has no label, but null"),
        ("a.jsonl", '{"text": 5, "label": 1}\n', "line 1 of PATH has no text, but 5"),
        ("a.jsonl", "\n", "PATH has no row"),
        ("a.tsv.gz", "no gzip", "cannot read PATH"),
    ],
)
def test_errors_name_file_and_line(name: str, content: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(ConfigError) as error:
        read_examples(str(path), Fields(None, None, None))
    assert words.replace("PATH", str(path)) in str(error.value)


def test_equal_texts_are_held_out_together(tmp_path: Path) -> None:
    path = tmp_path / "a.tsv"
    path.write_text("text\tlabel\n" + "".join(f"{i % 40}\t{i % 2}\n" for i in range(400)))
    train, held_out = split(read_examples(str(path), Fields(None, None, None)))
    assert len(train) + len(held_out) == 400 and len(held_out) == 40
    assert not {each.texts for each in train} & {each.texts for each in held_out}


def test_json_as_a_whole_has_no_examples(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"data": []}\n')
    for read in (
        lambda name: read_inputs(name, Fields(None, None, None)),
        lambda name: read_sentences(name, TagFields(None, None)),
        lambda name: read_untagged(name, TagFields(None, None)),
    ):
        with pytest.raises(ConfigError, match=r"a\.json is JSON as a whole, .* use \.jsonl"):
            read(str(path))
