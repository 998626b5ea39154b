"""Tokenizers: conversion of text to token ids and back.

A checkpoint stores its tokenizer as JSON (`to_json`, `tokenizer_from_json`): data, never code.
`byte` has a fixed vocabulary, `char` learns the characters of its corpus. Byte-pair encodings and
WordPiece are in `minillm.tokenizers`, other kinds in the optional package `tokenizers`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.documents import SpecialTokenizer, special_json
from minillm.data.package_tokenizer import tokenizer_of
from minillm.data.sentence_pieces import SentencePieces, foreign_marks
from minillm.tokenizers.files import WHOLE, read_definition
from minillm.tokenizers.model import Spans
from minillm.tokenizers.pieces import (
    characters_of,
    checked,
    code_points,
    cut_pieces,
    encoded,
    shortened,
    token_dtype,
    utf8_lengths,
)
from minillm.tokenizers.training import KINDS, Wish, count_words, train


class Tokenizer(Protocol):
    """Bidirectional map between text and token ids in [0, vocab_size)."""

    @property
    def name(self) -> str:
        """Name for messages: byte, char, bpe:512."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, [num_tokens], in the dtype `token_dtype(vocab_size)`.

        Raises ConfigError for text that has no ids.
        """

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each piece of a text, as `encode` does."""

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each piece, and the UTF-8 bytes of the text that each id stands for.

        The bytes are integers [num_tokens] whose sum is that of the piece; zeros if unknown.
        """

    def decode(self, ids: Any) -> str:
        """Return the text of a sequence of ids.

        Raises ConfigError for an id outside the vocabulary.
        """

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `tokenizer_from_json` builds an equal tokenizer."""


class ByteTokenizer:
    """Byte-level tokenizer: 256 tokens, the UTF-8 bytes, which can represent any text."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of `text`, uint8 [num_bytes]."""
        return np.frombuffer(encoded(text), np.uint8)

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(piece) for piece in pieces]

    def spans(self, text: str) -> Spans:
        """Return the ids of `text` and the character that each belongs to."""
        ids = self.encode(text).astype(np.int64)
        places = np.repeat(np.arange(len(text)), utf8_lengths(code_points(text)))
        return Spans(ids, places, places + 1)

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, np.ones(len(ids), np.uint8)) for ids in self.encode_pieces(pieces)]

    def decode(self, ids: Any) -> str:
        """Return the text.

        Invalid UTF-8, such as a sample cut inside a character, becomes U+FFFD.
        """
        return checked(ids, self).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "byte"}


class CharTokenizer:
    """Character-level tokenizer over a fixed set of characters, usually those of the corpus."""

    name = "char"

    def __init__(self, characters: str) -> None:
        """Assign ids to `characters` in order.

        Raises ConfigError if there are none or one repeats.
        """
        if not characters or len(set(characters)) != len(characters):
            raise ConfigError(
                "a character vocabulary needs at least one character and each only once, not "
                f"{shortened(characters)!r}"
            )
        self.characters = characters
        self.vocab_size = len(characters)
        self._points = code_points(characters)  # [V]
        # [largest code point + 2]: id of each code point, vocab_size for none.
        self._ids = np.full(int(self._points.max()) + 2, self.vocab_size, np.uint32)
        self._ids[self._points] = np.arange(self.vocab_size, dtype=np.uint32)
        self._bytes = np.array([len(character.encode()) for character in characters], np.uint8)

    @classmethod
    def of(cls, blocks: Iterable[str]) -> CharTokenizer:
        """Return the tokenizer of the characters of a text, sorted by code point."""
        seen = np.zeros(0x110000, bool)
        for block in blocks:
            seen[code_points(block)] = True
        return cls(characters_of(np.flatnonzero(seen)))

    def encode(self, text: str) -> np.ndarray:
        """Return one id a character.

        Raises ConfigError for characters outside the vocabulary; it names the first and its place.
        """
        points = code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = ids == self.vocab_size
        if unknown.any():
            at = int(unknown.argmax())
            around = text[max(0, at - 15) : at + 16]
            raise ConfigError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) in {around!r} is not among the "
                f"{self.vocab_size} characters of this vocabulary; leave it out, or train with "
                "--tokenizer byte, which can write any text"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(piece) for piece in pieces]

    def spans(self, text: str) -> Spans:
        """Return the ids of `text` and the character that each stands for."""
        places = np.arange(len(text))
        return Spans(self.encode(text).astype(np.int64), places, places + 1)

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, self._bytes[ids]) for ids in self.encode_pieces(pieces)]

    def decode(self, ids: Any) -> str:
        """Return one character an id."""
        return characters_of(self._points[checked(ids, self)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class IdTokenizer:
    """Placeholder for the unknown tokenizer of a token file: text is decimal ids and spaces."""

    name = "ids"

    def __init__(self, vocab_size: int, marks: Sequence[int] | None = None) -> None:
        """Take `vocab_size` ids, with those that begin and end a target if they are known.

        Raises ConfigError for marks that a translator cannot have.
        """
        self.vocab_size, self._marks = vocab_size, marks
        self.marks = None if marks is None else foreign_marks(marks, vocab_size)

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers in `text`.

        Raises ConfigError for a word that is not a number below vocab_size.
        """
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise ConfigError(
                    f"{shortened(word)!r} is not a token id below {self.vocab_size}; this data "
                    "came as token ids without a tokenizer, so text for it is written as numbers, "
                    "such as '12 7 345' (or name its tokenizer.json with --tokenizer)"
                )
        return np.array([int(word) for word in words], dtype=token_dtype(self.vocab_size))

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        return [self.encode(piece) for piece in pieces]

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        return [(ids, np.zeros(len(ids), np.uint8)) for ids in self.encode_pieces(pieces)]

    def decode(self, ids: Any) -> str:
        """Return the ids as decimal numbers between spaces."""
        return " ".join(map(str, checked(ids, self).tolist()))

    def to_json(self) -> dict[str, Any]:
        marks = {} if self._marks is None else {"marks": list(self._marks)}
        return {"kind": "ids", "vocab_size": self.vocab_size, **marks}


FILES = (".json", ".txt")  # ends of the names of a tokenizer's files

SPECIAL = {"special:": False, "documents:": True}
"""Prefix of a spec -> if the tokenizer marks sentences and documents (`SpecialTokenizer`)."""


def without_prefix(spec: str) -> str:
    """Return `spec` without the prefix that adds special tokens."""
    return functools.reduce(str.removeprefix, SPECIAL, spec)


def marks_documents(tokenizer: str | Tokenizer | None) -> bool:
    """Return True if a tokenizer, or the one of a spec, marks sentences and documents."""
    if isinstance(tokenizer, str):
        return any(on and tokenizer.startswith(prefix) for prefix, on in SPECIAL.items())
    return isinstance(tokenizer, SpecialTokenizer) and tokenizer.documents


def is_learnt(spec: str) -> bool:
    """Return True if the tokenizer `spec` is fitted to the text."""
    return without_prefix(spec).partition(":")[0] in ("char", *KINDS)


def make_tokenizer(spec: str, text: str | Iterable[str]) -> Tokenizer:
    """Make the tokenizer `spec`; one that is learnt is fitted to `text`, whole or in blocks.

    `spec` is "byte", "char", "bpe:SIZE" (byte-level byte-pair encoding of SIZE tokens),
    "wordpiece:SIZE" (of lowered letters), or files of a tokenizer (`read_definition`) as "hf:PATH"
    or a path. A prefix of `SPECIAL` adds special tokens. Raises ConfigError for any other spec, for
    a missing file and for a missing package.
    """
    for prefix, documents in SPECIAL.items():
        if spec.startswith(prefix):
            base = make_tokenizer(spec.removeprefix(prefix) or "byte", text)
            return SpecialTokenizer(base, documents)
    blocks = [text] if isinstance(text, str) else text
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer.of(blocks)
    kind, _, size = spec.partition(":")
    if kind in KINDS:
        if not (size.isascii() and size.isdigit()):
            raise ConfigError(f"tokenizer {spec!r} needs a vocabulary size, such as {kind}:8000")
        wish = Wish(int(size), lowercase=True)
        counts = count_words(kind, cut_pieces(blocks), wish)
        return tokenizer_of(train(kind, counts, wish), spec)
    path = Path(spec.removeprefix("hf:"))
    if spec.startswith("hf:") or path.suffix in FILES or path.expanduser().is_dir():
        return tokenizer_of(*read_definition(path))
    raise ConfigError(
        f"unknown tokenizer {spec!r}; choose byte, char, bpe:SIZE (such as bpe:8000), "
        f"wordpiece:SIZE, or the path of a {WHOLE}, a vocab.txt, or a folder with one"
    )


def tokenizer_from_json(value: Any) -> Tokenizer:
    """Rebuild the tokenizer from its `to_json` value.

    Raises ConfigError for any other value.
    """
    match value:
        case {"kind": "byte"}:
            return ByteTokenizer()
        case {"kind": "char", "characters": str(characters)}:
            return CharTokenizer(characters)
        case {"kind": "ids", "vocab_size": int(vocab_size)}:
            return IdTokenizer(vocab_size, value.get("marks"))
        case {"kind": "pieces", "tokenizer": dict(), "marks": [_, _]}:
            return SentencePieces(value)
        case {"kind": "hf", "name": str(name), "tokenizer": dict(definition)}:
            found = tokenizer_of(definition, name)
            found.more = {key: value[key] for key in ("ends", "chat") if key in value}
            return found
        case {"kind": "special", "base": base, "documents": bool(documents)}:
            return SpecialTokenizer(tokenizer_from_json(base), documents)
    raise ConfigError(
        f"not a tokenizer: {shortened(repr(value))}; known kinds are byte, char, ids, hf, "
        "pieces and special"
    )


def encoder_tokenizer(vocabulary: Mapping[str, Any], vocab: int) -> SpecialTokenizer:
    """Return the tokenizer with the marks of an encoder of `vocab` tokens.

    Raises ConfigError for one that is not known or has no such marks.
    """
    found = tokenizer_from_json(special_json(vocabulary, False))
    assert isinstance(found, SpecialTokenizer)
    if found.vocab_size > vocab:
        what = "has no [CLS] and [SEP], nor <s> and </s>"
        if found.name == "ids":
            what = "is not known: there is no tokenizer.json"
        raise ConfigError(
            f"the tokenizer of these weights {what}, so it cannot mark the ends of a text; put the "
            "tokenizer.json of the model into its folder"
        )
    return found
