"""Sources and their text: folders, patterns, encodings, compressed and structured files."""

from __future__ import annotations

import gzip
import json
import os
import tracemalloc
from pathlib import Path

import pytest

from minillm.base.errors import ConfigError
from minillm.data.reading import read_blocks, scan
from minillm.data.sources import TextSource, find_source


def text_of(source: object, field: str = "text") -> str:
    found = find_source(os.fspath(source), field)  # type: ignore[call-overload]
    assert isinstance(found, TextSource)
    return "".join(read_blocks(TextSource.from_json(json.loads(json.dumps(found.to_json())))))


def summary(source: object) -> str:
    found = find_source(str(source))
    assert isinstance(found, TextSource)
    return found.summary


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Make a folder with texts of all kinds, and with what must not be read."""
    made = tmp_path / "folder"
    (made / "b" / "deep").mkdir(parents=True)
    (made / "a.TXT").write_text("one\n")
    (made / "b" / "read.md").write_text("two")
    (made / "b" / "deep" / "code.py").write_text("three\n")
    (made / "c.jsonl").write_text('{"text": "four"}\n\n"five"\n')
    (made / "d.txt.gz").write_bytes(gzip.compress(b"six\n"))
    (made / "picture.png").write_bytes(b"\x89PNG")
    (made / "Makefile").write_text("all:")
    (made / "._a.txt").write_text("hidden")
    (made / ".git").mkdir()
    (made / ".git" / "x.txt").write_text("hidden")
    os.mkfifo(made / "pipe.txt")
    (made / "gone.txt").symlink_to("nowhere")
    return made


TEXT = "one\ntwo\nthree\nfour\nfive\nsix\n"


def test_a_folder_reads_its_kinds_and_counts_what_it_leaves_out(folder: Path) -> None:
    assert text_of(folder).splitlines() == ["one", "three", "two", "four", "five", "six"]
    assert summary(folder) == (
        "5 files (2 .txt, 1 .py, 1 .md, 1 .jsonl; left out: 2 hidden, 1 without a suffix, "
        "1 special file, 1 broken link, 1 .png)"
    )


def test_linked_folders_are_read_once_and_loops_end(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "x.txt").write_text("seven\n")
    (tmp_path / "elsewhere" / "back").symlink_to(folder)
    (folder / "link").symlink_to(tmp_path / "elsewhere")
    (folder / "link2").symlink_to(tmp_path / "elsewhere")
    (folder / "b" / "loop").symlink_to(folder)
    assert sorted(text_of(folder).split()) == sorted([*TEXT.split(), "seven"])


def test_patterns(folder: Path) -> None:
    assert text_of(folder / "**" / "*.md") + text_of(folder / "**" / "*.py") == "twothree\n"
    assert text_of(folder / "[ab]*") == "one\n"
    assert text_of(folder / "Make*") == "all:"
    left_out = "left out: 1 special file, 1 broken link"
    assert summary(folder / "*.[tT]*") == f"2 files (2 .txt; {left_out})"
    with pytest.raises(ConfigError, match="matches no file"):
        find_source(str(folder / "*.tex"))
    (folder / "ids_1.bin").write_bytes(b"12")
    with pytest.raises(ConfigError, match=r"matches the token file .*ids_1\.bin"):
        find_source(str(folder / "ids_*"))
    (folder / "[odd].txt").write_text("an existing path is no pattern")
    assert text_of(folder / "[odd].txt").startswith("an existing")


def test_names_may_be_any_bytes(tmp_path: Path) -> None:
    for name in (b"caf\xe9.txt", "ä.txt".encode(), b"z.txt"):
        Path(os.fsdecode(bytes(tmp_path) + b"/" + name)).write_bytes(name + b"\n")
    found = find_source(str(tmp_path))
    assert isinstance(found, TextSource)
    assert text_bytes(found) == [b"caf?.txt", b"z.txt", "ä.txt".encode()]
    bad = Path(os.fsdecode(bytes(tmp_path) + b"/caf\xe9.txt"))
    bad.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="caf\ufffd\\.txt is not UTF-8") as error:
        list(read_blocks(found))
    assert str(error.value).encode()


def text_bytes(source: TextSource) -> list[bytes]:
    Path(source.files[0]).write_bytes(b"caf?.txt\n")
    return "".join(read_blocks(source)).encode().splitlines()


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("", "--data is empty"),
        ("~nosuchuser/x", "cannot look at"),
        ("a\0b", "cannot look at|no such file"),
        ("x" * 5000, "cannot look at"),
    ],
)
def test_names_that_cannot_be_looked_at(source: str, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        find_source(source)


def written(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


WORDS = "wörter, слова, 言葉 😀\n"


@pytest.mark.parametrize("name", ["x.txt", "x.txt.gz", "x.jsonl"])
def test_a_byte_order_mark_is_dropped(name: str, tmp_path: Path) -> None:
    content = json.dumps({"text": WORDS}) if "jsonl" in name else WORDS * 20_000
    data = b"\xef\xbb\xbf" + content.encode()
    path = written(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data)
    assert text_of(path) == (WORDS if "jsonl" in name else WORDS * 20_000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (WORDS.encode("utf-16"), "is UTF-16 text.*iconv"),
        ("plain words\n".encode("utf-16-le") * 99, "characters are NUL.*iconv -f UTF-16LE"),
        (("ö" * 300_000).encode() + b"\xe9 ", "byte 0xe9 at position 600000 "),
        (b"\xef\xbb\xbfabc\xff", "byte 0xff at position 6 "),
        (
            b"x" * ((1 << 18) - 1) + "ö".encode()[:1],
            "byte 0xc3 at position 262143 ",
        ),
        (b" \n\t", "3 characters, all blank"),
        (b"\xef\xbb\xbf", "0 bytes"),
    ],
)
def test_what_is_no_text_is_named(content: bytes, words: str, tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", content)
    with pytest.raises(ConfigError, match=words):
        scan(TextSource(str(path), (path,)))


def test_nul_characters_are_named(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt", b"a text\0 with two\0 of them\n")
    facts = scan(TextSource(str(path), (path,)))
    assert facts.notes == [f"{path} has 2 NUL characters, which are learnt as text"]


def damaged(content: bytes) -> bytes:
    changed = bytearray(gzip.compress(os.urandom(5000).hex().encode()))
    changed[1000] ^= 255
    return bytes(changed) if content == b"flip" else gzip.compress(b"text" * 5000)[:40]


@pytest.mark.parametrize(
    "content", [damaged(b"flip"), damaged(b"cut"), b"not compressed"], ids=["flip", "cut", "plain"]
)
@pytest.mark.parametrize("name", ["x.txt.gz", "x.jsonl.gz"])
def test_damaged_archives_are_named(content: bytes, name: str, tmp_path: Path) -> None:
    path = written(tmp_path, name, content)
    with pytest.raises(ConfigError, match=rf"{path}.*(it is damaged|is not UTF-8|is not JSON)"):
        text_of(path)


def test_a_bomb_is_read_in_blocks(tmp_path: Path) -> None:
    path = written(tmp_path, "x.txt.gz", gzip.compress(b"word " * (8 << 20)))  # 42 MB
    tracemalloc.start()
    try:
        assert scan(TextSource("x", (path,))).num_characters == 40 << 20
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ('{"text": "a"}\n{"text": ', "line 2 is not JSON"),
        ('{"body": "a", "id": 1}', r"no text in the field 'text' \(it has body, id\)"),
        ('{"text": 5}', "no text in the field"),
        ("[1, 2]", "no text in the field"),
        ('{"text": "\\ud800"}', "line 1 holds half of a surrogate pair"),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_lines_that_hold_no_text_are_named(lines: str, words: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=words):
        text_of(written(tmp_path, "x.jsonl", lines.encode()))


def test_another_field(tmp_path: Path) -> None:
    path = written(tmp_path, "x.jsonl", b'{"text": 1, "body": "one"}\n{"body": "two\\n"}')
    assert text_of(path, "body") == "one\ntwo\n"


def test_parquet(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: pip install pyarrow")
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "x.parquet"
    table = pyarrow.table({"text": ["one", None, "zwei ü\n", ""], "id": [1, 2, 3, 4]})
    pyarrow.parquet.write_table(table, path)
    assert text_of(path) == "one\nzwei ü\n"
    for field, words in (("body", r"no column 'body' \(it has text, id\)"), ("id", "holds int64")):
        with pytest.raises(ConfigError, match=words):
            text_of(path, field)
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(ConfigError, match="not a Parquet file"):
        text_of(path)
