"""Tagged sentences: CoNLL columns and JSON lines, plain or .gz, with file and line in every error.

A CoNLL file has a word on each line, in columns between tabs or blanks. An empty line, or one of
tabs and blanks alone, ends a sentence. -DOCSTART- lines are left out, and in files with tabs also
lines of comment ("# text = ...").
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.base.log import plural
from minillm.data.tables import Column, ending, read_table, read_text, refuse_json
from minillm.data.tags import is_tag

TOKENS, TAGS = ("tokens", "words"), ("tags", "ner_tags", "labels")  # usual fields of JSON lines
TEXT = ("text", "sentence")
START = "-DOCSTART-"
LINES = (".txt", "")  # endings of files with a text on each line, where nothing is tagged
_WORD = re.compile(r"\w+|[^\w\s]")


class Sentence(NamedTuple):
    """Words of a sentence, with their tags as the file has them."""

    tokens: tuple[str, ...]
    tags: tuple[str, ...]  # () where they are not asked for
    line: int  # in its file, from 1, of the first word

    @property
    def texts(self) -> tuple[str, ...]:
        """The words, as the parts of any example are called."""
        return self.tokens


class TagFields(NamedTuple):
    """Columns of words and tags, None: the usual ones."""

    token: str | None = None
    tag: str | None = None


def read_sentences(name: str, fields: TagFields, *, tagged: bool = True) -> list[Sentence]:
    """Return the sentences of a file, with their tags if it is to be `tagged`.

    Raises ConfigError with file and line for a file that cannot be read or has no sentence, for
    rows of different lengths, and for a word without a tag that `is_tag`.
    """
    refuse_json(name)
    read = _json_sentences if ending(name) == ".jsonl" else _column_sentences
    found = list(read(name, fields, tagged))
    if not found:
        raise ConfigError(f"{name} has no sentence; give it a word and its tag on each line")
    return found


class Untagged(NamedTuple):
    """Sentence to tag."""

    text: str | None  # as it was given, None: as words
    tokens: tuple[str, ...]
    starts: tuple[int, ...]  # places of the words in `text`, () without one


def read_untagged(name: str, fields: TagFields) -> list[Untagged]:
    """Return the sentences of a file to tag: CoNLL columns, JSON lines, or .txt with lines of text.

    A JSON line has a field of words, or one of text. Raises ConfigError as `read_sentences` does.
    """
    if ending(name) in LINES:
        lines = read_text(Path(name)).split("\n")
        return [cut(line.removesuffix("\r")) for line in (lines if lines[-1] else lines[:-1])]
    if ending(name) == ".jsonl" and fields.token is None:
        column = Column("--token-field", None, TOKENS + TEXT)
        return [_either(name, line, value) for line, (value,) in read_table(name, [column])]
    found = read_sentences(name, fields, tagged=False)
    return [Untagged(None, each.tokens, ()) for each in found]


def cut(text: str) -> Untagged:
    """Return a text and its words: runs of letters and digits, and every other mark by itself."""
    found = list(_WORD.finditer(text))
    return Untagged(text, tuple(m[0] for m in found), tuple(m.start() for m in found))


def _either(name: str, line: int, value: Any) -> Untagged:
    if isinstance(value, str):
        return cut(value)
    return Untagged(None, _strings(name, line, value, "words"), ())


def _strings(name: str, line: int, value: Any, what: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise ConfigError(
            f"line {line} of {name} has no list of {what}, but {json.dumps(value)[:60]}; give it "
            'texts, as in {"tokens": ["in", "Bath"], "tags": ["O", "B-place"]}'
        )
    return tuple(value)


def _json_sentences(name: str, fields: TagFields, tagged: bool) -> Iterator[Sentence]:
    columns = [Column("--token-field", fields.token, TOKENS)]
    columns += [Column("--tag-field", fields.tag, TAGS)] * tagged
    for line, values in read_table(name, columns):
        tokens = _strings(name, line, values[0], "words")
        tags = _strings(name, line, values[1], "tags") if tagged else ()
        if not tokens:
            raise ConfigError(f"line {line} of {name} has no word; remove it")
        if tagged and len(tags) != len(tokens):
            raise ConfigError(
                f"line {line} of {name} has {plural(len(tokens), 'word')}, but "
                f"{plural(len(tags), 'tag')}; each word needs one"
            )
        for tag in tags:
            _check(name, line, tag)
        yield Sentence(tokens, tags, line)


def _check(name: str, line: int, tag: str) -> None:
    if not is_tag(tag):
        raise ConfigError(
            f"line {line} of {name} has the tag {tag!r}; a tag is O, or one of B-, I-, E- and S- "
            "with a type behind it, as in B-person (--tag-field chooses another column)"
        )


def _column_sentences(name: str, fields: TagFields, tagged: bool) -> Iterator[Sentence]:
    tokens, tags, start, width = list[str](), list[str](), 0, 0
    token_at, tag_at, split = 0, 0, _blanks
    for line, content in enumerate(read_text(Path(name)).split("\n"), 1):
        content = content.rstrip("\r")
        if not content.strip() or content.lstrip().startswith(START):
            if tokens:
                yield Sentence(tuple(tokens), tuple(tags), start)
            tokens, tags = [], []
            continue
        if split is _tabs and content.startswith("# ") and "\t" not in content:
            continue
        if not width:
            if content.startswith("# ") and "=" in content:  # of CoNLL-U, before any word
                continue
            split = _tabs if "\t" in content else _blanks
            width = len(split(content))
            if tagged and width == 1:
                raise ConfigError(
                    f"line {line} of {name} has one column; write a word, a tab and its tag on "
                    "each line"
                )
            token_at = _place(name, "--token-field", fields.token, 1, width)
            tag_at = _place(name, "--tag-field", fields.tag, width, width) if tagged else 0
        values = split(content)
        if len(values) != width:
            raise ConfigError(
                f"line {line} of {name} has {plural(len(values), 'column')}, but the first has "
                f"{width}; separate all columns by tabs, or all by blanks"
            )
        start = start if tokens else line
        tokens.append(values[token_at])
        if tagged:
            tags.append(values[tag_at].strip())
            _check(name, line, tags[-1])
    if tokens:
        yield Sentence(tuple(tokens), tuple(tags), start)


def _tabs(content: str) -> list[str]:
    return content.rstrip("\t").split("\t")


def _blanks(content: str) -> list[str]:
    return re.findall(r"[^ \t]+", content)


def _place(name: str, flag: str, asked: str | None, usual: int, width: int) -> int:
    """Return the index of a column. Raises ConfigError unless it is one of `width`."""
    number = usual if asked is None else int(asked) if asked.isdecimal() else 0
    if not 1 <= number <= width:
        raise ConfigError(
            f"{flag} {asked} is no column of {name}, whose lines have {width}; pass a number from "
            f"1 to {width}"
        )
    return number - 1
