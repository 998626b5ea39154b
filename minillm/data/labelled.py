"""Labelled texts: examples out of tables, and a generated set with a stated rule."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.tables import Column, Row, is_table, read_table, read_text, refuse_json

TEXT, LABEL = ("sentence", "text"), ("label", "score")  # columns that are taken by themselves
PAIR = (("sentence1", "premise", "question1"), ("sentence2", "hypothesis", "question2"))
HELD_OUT_SHARE, MOST_HELD_OUT = 10, 1000  # one of 10 examples, at most so many
NUM_OPINIONS = 6000
PRAISE, BLAME, PLAIN = (
    tuple(words.split())
    for words in (
        "bright clever fine funny good great honest lovely moving rich sharp warm",
        "bad bland cold cruel dull empty flat lazy long poor sad weak",
        "a and film for in it of people plot story that the this town we with",
    )
)


class Example(NamedTuple):
    """Text, or pair of texts, with its label."""

    texts: tuple[str, ...]
    label: str  # several as a JSON list
    line: int  # in its file, from 1


class Distinct(Protocol):
    """Example that its texts tell apart from others."""

    @property
    def texts(self) -> tuple[str, ...]: ...


DistinctT = TypeVar("DistinctT", bound=Distinct)


class Fields(NamedTuple):
    """Columns of texts and labels, None: the usual names."""

    text: str | None
    pair: str | None
    label: str | None
    pairs: bool = False
    several: bool = False  # labels of a text, separated by commas or as a JSON list

    def columns(self) -> list[Column]:
        """Return the columns of the texts."""
        if not self.pairs:
            return [Column("--text-field", self.text, TEXT)]
        return [
            Column("--text-field", self.text, PAIR[0]),
            Column("--pair-field", self.pair, PAIR[1]),
        ]


def read_examples(name: str, fields: Fields) -> list[Example]:
    """Return the examples of a table.

    Raises ConfigError with file and line for a row without label, and as `read_table` does.
    """
    columns = [*fields.columns(), Column("--label-field", fields.label, LABEL)]
    return [_example(name, row, fields.several) for row in read_table(name, columns)]


class InputFields(Protocol):
    """Columns of inputs."""

    @property
    def pairs(self) -> bool: ...

    def columns(self) -> list[Column]: ...


def read_inputs(name: str, fields: InputFields) -> list[tuple[str, ...]]:
    """Return the texts of each row of a table, which needs no labels, or of each line of a file.

    Raises ConfigError for pairs of lines and for .json, and as `read_table` does.
    """
    if not is_table(name):
        if fields.pairs:
            raise ConfigError(
                f"{name} is no table, which pairs of texts need: .tsv, .csv or .jsonl"
            )
        refuse_json(name)
        lines = read_text(Path(name)).split("\n")
        if lines == [""]:
            raise ConfigError(f"{name} is empty; give it a text on each line")
        return [(line.removesuffix("\r"),) for line in (lines if lines[-1] else lines[:-1])]
    rows = read_table(name, fields.columns())
    return [tuple(_text(name, row, value) for value in row.values) for row in rows]


def _example(name: str, row: Row, several: bool) -> Example:
    *texts, label = row.values
    if several and isinstance(label, list):
        label = json.dumps(label)
    if isinstance(label, list | dict | None):
        raise ConfigError(f"line {row.line} of {name} has no label, but {json.dumps(label)}")
    word = label if isinstance(label, str) else json.dumps(label)
    if not word.strip():
        raise ConfigError(f"line {row.line} of {name} has no label; give it one, or remove it")
    return Example(tuple(_text(name, row, text) for text in texts), word.strip(), row.line)


def _text(name: str, row: Row, value: Any) -> str:
    if not isinstance(value, str):
        raise ConfigError(f"line {row.line} of {name} has no text, but {json.dumps(value)[:60]}")
    return value


def several_of(example: Example, name: str) -> list[str]:
    """Return the labels of an example that may have several.

    They are separated by commas, or a JSON list, which is [] for none. Raises ConfigError with file
    and line for anything else.
    """
    if not example.label.startswith("["):
        found = [word.strip() for word in example.label.split(",")]
    else:
        try:
            held = json.loads(example.label)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"line {example.line} of {name} has labels that are no JSON list: {error}"
            ) from None
        found = [each if isinstance(each, str) else json.dumps(each) for each in held]
    if not all(found):
        raise ConfigError(
            f"line {example.line} of {name} has an empty label among {example.label!r}; remove it, "
            "or write [] for a text without labels"
        )
    return found


def labels_of(labels: Iterable[str]) -> list[str]:
    """Return the different labels in order: by value if all are whole numbers, else by name."""
    found = sorted(set(labels))
    if all(label.removeprefix("-").isdecimal() for label in found):
        return sorted(found, key=int)
    return found


def numbers_of(examples: Sequence[Example], labels: Sequence[str], name: str) -> list[int]:
    """Return the number of each example's label.

    Raises ConfigError with file and line for a label that is not among `labels`.
    """
    known = {label: number for number, label in enumerate(labels)}
    for example in examples:
        if example.label not in known:
            shown = ", ".join(map(repr, labels[:8])) + ", ..." * (len(labels) > 8)
            raise ConfigError(
                f"line {example.line} of {name} has the label {example.label!r}, which is not "
                f"among those of the model: {shown}"
            )
    return [known[example.label] for example in examples]


def split(examples: Sequence[DistinctT]) -> tuple[list[DistinctT], list[DistinctT]]:
    """Return examples to train on, and one of 10, at most 1,000, that are held out.

    Those whose texts have the lowest hashes are held out, so that equal texts lie on one side.
    Where nothing would be left to train on, nothing is held out.
    """
    if len(examples) < HELD_OUT_SHARE:
        return list(examples), []
    marks = [hashlib.sha256("\0".join(each.texts).encode()).digest() for each in examples]
    number = min(len(examples) // HELD_OUT_SHARE, MOST_HELD_OUT)
    last = sorted(marks)[number - 1]
    train = [each for each, mark in zip(examples, marks, strict=True) if mark > last]
    if not train:
        return list(examples), []
    return train, [each for each, mark in zip(examples, marks, strict=True) if mark <= last]


@functools.cache
def _opinions() -> dict[str, tuple[int, int]]:
    """Return sentences, and the number of words of praise and of blame in each."""
    rng, found = np.random.default_rng(0), dict[str, tuple[int, int]]()
    kinds, most = (PRAISE, BLAME, PLAIN, PLAIN, PLAIN), 9
    while len(found) < NUM_OPINIONS:
        words, score = list[str](), [0, 0]
        drawn = rng.random((3, most)).tolist()
        for kind, turn, place in list(zip(*drawn, strict=True))[: rng.integers(3, most + 1)]:
            of = kinds[int(kind * len(kinds))]
            turned = of is not PLAIN and turn < 0.4
            if of is not PLAIN:
                score[(of is BLAME) != turned] += 1
            words += ["not"] * turned + [of[int(place * len(of))]]
        if score[0] != score[1]:
            found[" ".join(words)] = (score[0], score[1])
    return found


def _overall(praise: int, blame: int) -> str:
    """Return the label of an opinion."""
    return "positive" if praise > blame else "negative"


def opinions(label: Callable[[int, int], str] = _overall) -> list[Example]:
    """Return generated opinions, the same everywhere, by default as positive or negative.

    A sentence has three to nine words: praise, blame, and words that say nothing. "not" turns the
    next word of praise or blame around. `label` is that of so many words of praise and of blame:
    positive if there is more praise. No sentence has as much of one as of the other.
    """
    each = enumerate(_opinions().items(), 1)
    return [Example((text,), label(*counts), line) for line, (text, counts) in each]
