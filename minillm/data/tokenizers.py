"""Tokenizers: conversion of text to token ids and back.

A checkpoint stores its tokenizer as JSON (`to_json`, `tokenizer_from_json`): data, never code.
`byte` has a fixed vocabulary, `char` learns the characters of its corpus, and byte-pair encodings
use the optional package `tokenizers`.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from minillm.base.errors import ConfigError

# Characters that a byte-pair encoder gets at once: it needs hundreds of bytes a character.
PIECE_CHARACTERS = 1 << 20

LARGEST_GAP = 1 << 16  # ids without a token that a tokenizer.json may have beyond half of all

NEED_PACKAGE = (
    "the package 'tokenizers' is not installed; install it with: "
    "pip install 'minillm-mpi[tokenizers]'"
)


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

    def decode(self, ids: Any) -> str:
        """Return the text of a sequence of ids.

        Raises ConfigError for an id outside the vocabulary.
        """

    def to_json(self) -> dict[str, Any]:
        """Return a JSON value from which `tokenizer_from_json` builds an equal tokenizer."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds ids below `vocab_size`."""
    return np.dtype(
        np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )


class ByteTokenizer:
    """Byte-level tokenizer: 256 tokens, the UTF-8 bytes, which can represent any text."""

    name = "byte"
    vocab_size = 256

    def encode(self, text: str) -> np.ndarray:
        """Return the UTF-8 bytes of `text`, uint8 [num_bytes]."""
        return np.frombuffer(_encoded(text, "utf-8"), np.uint8)

    def decode(self, ids: Any) -> str:
        """Return the text.

        Invalid UTF-8, such as a sample cut inside a character, becomes U+FFFD.
        """
        return _checked(ids, self).astype(np.uint8).tobytes().decode("utf-8", errors="replace")

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
                f"{_shorten(characters)!r}"
            )
        self.characters = characters
        self.vocab_size = len(characters)
        self._points = _code_points(characters)  # [V]
        # [largest code point + 2]: id of each code point, vocab_size for none.
        self._ids = np.full(int(self._points.max()) + 2, self.vocab_size, np.uint32)
        self._ids[self._points] = np.arange(self.vocab_size, dtype=np.uint32)

    @classmethod
    def of(cls, text: str) -> CharTokenizer:
        """Return the tokenizer of the characters of `text`, sorted by code point."""
        return cls(_characters(np.unique(_code_points(text))))

    def encode(self, text: str) -> np.ndarray:
        """Return one id a character.

        Raises ConfigError for characters outside the vocabulary, with the position of the first.
        """
        points = _code_points(text)
        ids = self._ids[np.minimum(points, len(self._ids) - 1)]
        unknown = ids == self.vocab_size
        if unknown.any():
            at = int(unknown.argmax())
            raise ConfigError(
                f"character {text[at]!r} (U+{ord(text[at]):04X}) at position {at} is not among the "
                f"{self.vocab_size} characters of this vocabulary; leave it out, or train with "
                "--tokenizer byte, which can write any text"
            )
        return ids.astype(token_dtype(self.vocab_size))

    def decode(self, ids: Any) -> str:
        """Return one character an id."""
        return _characters(self._points[_checked(ids, self)])

    def to_json(self) -> dict[str, Any]:
        return {"kind": "char", "characters": self.characters}


class IdTokenizer:
    """Placeholder for the unknown tokenizer of a token file: text is decimal ids and spaces."""

    name = "ids"

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        """Return the numbers in `text`.

        Raises ConfigError for a word that is not a number below vocab_size.
        """
        words = text.split()
        for word in words:
            if not (word.isascii() and word.isdigit() and int(word) < self.vocab_size):
                raise ConfigError(
                    f"{_shorten(word)!r} is not a token id below {self.vocab_size}; this data came "
                    "as token ids without a tokenizer, so text for it is written as numbers, such "
                    "as '12 7 345' (or name its tokenizer.json with --tokenizer)"
                )
        return np.array([int(word) for word in words], dtype=token_dtype(self.vocab_size))

    def decode(self, ids: Any) -> str:
        """Return the ids as decimal numbers between spaces."""
        return " ".join(map(str, _checked(ids, self).tolist()))

    def to_json(self) -> dict[str, Any]:
        return {"kind": "ids", "vocab_size": self.vocab_size}


class HFTokenizer:
    """Tokenizer of the package `tokenizers`, such as a byte-pair encoding.

    Settings of the file that serve other programs are switched off: truncation and padding change
    the number of tokens of a text, and dropout gives every rank other tokens.
    """

    def __init__(self, definition: str, name: str) -> None:
        """Build the tokenizer from the text of a tokenizer.json.

        Raises ConfigError if the package is missing, the text is not a tokenizer, or its largest id
        is far above its number of tokens.
        """
        package = _package()
        self.name = name
        try:
            definition, self.switched_off = _plain_settings(definition)
        except (ValueError, AttributeError, RecursionError):  # no JSON object
            self.switched_off = ()
        with self._errors("is not a tokenizer of the 'tokenizers' package"):
            self._tokenizer = package.Tokenizer.from_str(definition)
            ids = self._tokenizer.get_vocab(with_added_tokens=True).values()
        self.vocab_size = max(ids, default=-1) + 1
        if self.vocab_size > 2 * len(ids) + LARGEST_GAP:
            raise ConfigError(
                f"{name} has {len(ids)} tokens, but its largest id is {self.vocab_size - 1}; a "
                "model would hold a row for every id below it. Number its tokens from 0"
            )

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, without special tokens.

        Long texts are cut after line ends, about a million characters apart. Raises ConfigError for
        a text that the package cannot encode.
        """
        dtype = token_dtype(self.vocab_size)
        parts = []
        for piece in _pieces(text, PIECE_CHARACTERS):
            with self._errors("cannot encode the text"):
                ids = self._tokenizer.encode(piece, add_special_tokens=False).ids
            parts.append(np.array(ids, dtype=dtype))
        return np.concatenate(parts) if parts else np.empty(0, dtype)

    @contextlib.contextmanager
    def _errors(self, failed: str) -> Iterator[None]:
        """Turn an error of the package into a ConfigError.

        The package raises bare Exception, and a BaseException where its Rust code panics.
        """
        try:
            yield
        except (KeyboardInterrupt, SystemExit, GeneratorExit, MemoryError):
            raise
        except BaseException as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise ConfigError(
                f"{self.name} {failed}: {reason}; train with another tokenizer.json, or choose "
                "byte or char"
            ) from None

    def decode(self, ids: Any) -> str:
        """Return the text, including special tokens."""
        with self._errors("cannot decode ids"):
            return self._tokenizer.decode(_checked(ids, self).tolist(), skip_special_tokens=False)

    def to_json(self) -> dict[str, Any]:
        return {"kind": "hf", "name": self.name, "tokenizer": json.loads(self._tokenizer.to_str())}


def make_tokenizer(spec: str, text: str) -> Tokenizer:
    """Make the tokenizer `spec`; "char" and "bpe:SIZE" are fitted to `text`.

    `spec` is "byte", "char", "bpe:SIZE" (byte-level byte-pair encoding of SIZE tokens; Sennrich et
    al. 2016, arXiv:1508.07909), or a tokenizer.json as "hf:FILE" or a path. Raises ConfigError for
    any other spec, for a missing file and for a missing package.
    """
    if spec == "byte":
        return ByteTokenizer()
    if spec == "char":
        return CharTokenizer.of(text)
    if spec.startswith("bpe:"):
        return _train_bpe(spec, text)
    if spec.startswith("hf:") or spec.endswith(".json"):
        return _read_hf(Path(spec.removeprefix("hf:")))
    raise ConfigError(
        f"unknown tokenizer {spec!r}; choose byte, char, bpe:SIZE (such as bpe:512), or the path "
        "of a tokenizer.json"
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
            return IdTokenizer(vocab_size)
        case {"kind": "hf", "name": str(name), "tokenizer": dict(definition)}:
            return HFTokenizer(json.dumps(definition), name)
    raise ConfigError(
        f"not a tokenizer: {_shorten(repr(value))}; known kinds are byte, char, ids and hf"
    )


def _train_bpe(spec: str, text: str) -> HFTokenizer:
    size = spec.removeprefix("bpe:")
    if not (size.isascii() and size.isdigit() and int(size) >= 256):
        raise ConfigError(
            f"tokenizer {spec!r} needs a vocabulary size of at least 256 (every byte is a token), "
            "such as bpe:512"
        )
    package = _package()
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    alphabet = package.pre_tokenizers.ByteLevel.alphabet()
    trainer = package.trainers.BpeTrainer(
        vocab_size=int(size), initial_alphabet=alphabet, show_progress=False, special_tokens=[]
    )
    tokenizer.train_from_iterator(_pieces(text, PIECE_CHARACTERS), trainer)
    return HFTokenizer(tokenizer.to_str(), spec)


def _read_hf(path: Path) -> HFTokenizer:
    try:
        definition = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ConfigError(
            f"cannot read the tokenizer {path}: {reason}; give the path of a tokenizer.json, or "
            "choose byte or char"
        ) from None
    return HFTokenizer(definition, path.name)


def _plain_settings(definition: str) -> tuple[str, tuple[str, ...]]:
    """Return a tokenizer.json without truncation, padding and dropout, and those it had."""
    value = json.loads(definition)
    model = value.get("model")
    found = []
    for table, name in ((value, "truncation"), (value, "padding"), (model or {}, "dropout")):
        if table.get(name):
            table[name] = None
            found.append(name)
    return (json.dumps(value) if found else definition), tuple(found)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(NEED_PACKAGE) from None
    return tokenizers


def _pieces(text: str, size: int) -> Iterator[str]:
    """Cut `text` after the first line end at or beyond every `size` characters."""
    start = 0
    while start < len(text):
        stop = text.find("\n", start + size - 1) + 1 or len(text)
        yield text[start:stop]
        start = stop


def _code_points(text: str) -> np.ndarray:
    return np.frombuffer(_encoded(text, "utf-32-le"), np.uint32)


def _encoded(text: str, codec: str) -> bytes:
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise ConfigError(
            f"the text has {code}, half of a surrogate pair and no character; remove it "
            "(a terminal or file in another encoding?)"
        ) from None


def _characters(points: np.ndarray) -> str:
    return points.astype("<u4").tobytes().decode("utf-32-le")


def _checked(ids: Any, tokenizer: Tokenizer) -> np.ndarray:
    """Return `ids` as int64 [num_tokens]; raise ConfigError for one outside the vocabulary."""
    array = np.asarray(ids, dtype=np.int64).reshape(-1)
    outside = (array < 0) | (array >= tokenizer.vocab_size)
    if outside.any():
        at = int(outside.argmax())
        raise ConfigError(
            f"token id {int(array[at])} at position {at} is not in the {tokenizer.name} vocabulary "
            f"of {tokenizer.vocab_size} tokens"
        )
    return array


def _shorten(text: str, limit: int = 60) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
