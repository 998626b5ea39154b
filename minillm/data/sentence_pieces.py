"""Tokenizer of Marian's translators: two SentencePiece models over one table of ids.

SentencePiece (Kudo and Richardson 2018, arXiv:1808.06226) is the optional package `sentencepiece`.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from minillm.base.errors import ConfigError
from minillm.tokenizers.pieces import checked, token_dtype

NEED_PACKAGE = (
    "the package 'sentencepiece' is not installed; install it with: "
    "pip install 'minillm-mpi[sentencepiece]'"
)
LANGUAGE = re.compile(r">>\S+<<")  # before a source that may be translated into several languages
UNKNOWN, BLANK = "<unk>", "▁"


class Marks(NamedTuple):
    """Ids at the ends of a translator's sequences."""

    end: int  # ends sources and targets
    start: int | None  # begins targets, the last id, never chosen; None: `end` does
    vocab: int  # number of ids, the marks included


def marks_of(tokenizer: Any) -> Marks:
    """Return the marks that a tokenizer has, or one id behind its own that begins and ends."""
    size = tokenizer.vocab_size
    return getattr(tokenizer, "marks", None) or Marks(size, None, size + 1)


def foreign_marks(pair: Sequence[Any], vocab: int) -> Marks:
    """Return the marks [start, end] that are among `vocab` ids.

    Raises ConfigError for ids that a translator here cannot have.
    """
    start, end = pair
    if start != vocab - 1 or type(end) is not int or not 0 <= end < start:
        raise ConfigError(
            f"targets that begin with the id {start} and end with {end} are not supported; of "
            f"{vocab} tokens the last one, {vocab - 1}, must begin them, and another one end them"
        )
    return Marks(end, start, vocab)


class SentencePieces:
    """Tokenizer that encodes sources, and with `target` targets, and decodes targets."""

    name = "sentencepiece"

    def __init__(self, value: Mapping[str, Any]) -> None:
        """Build the tokenizer of its JSON `value`. Raises ConfigError if it cannot be read."""
        try:
            import sentencepiece
        except ImportError:
            raise ConfigError(NEED_PACKAGE) from None
        files, self._value = value["tokenizer"], value
        self._ids: dict[str, int] = files["model"]["vocab"]
        try:
            self._models = [
                sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(files[side]))
                for side in ("source", "target")
            ]
        except (ValueError, RuntimeError, OSError) as error:
            raise ConfigError(f"{value['name']} is no model of SentencePiece: {error}") from None
        self.vocab_size = max(self._ids.values()) + 1
        self._pieces = {number: piece for piece, number in self._ids.items()}
        self.marks = foreign_marks(value["marks"], self.vocab_size)
        self._side = 0

    @property
    def target(self) -> SentencePieces:
        """The same tokenizer for targets."""
        other = object.__new__(SentencePieces)
        other.__dict__ |= self.__dict__ | {"_side": 1}
        return other

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`. A language such as >>fra<< before it is a token."""
        language = LANGUAGE.match(text.lstrip())
        words = [] if language is None else [language[0]]
        rest = text if language is None else text.lstrip()[language.end() :]
        words += self._models[self._side].encode(rest, out_type=str)
        unknown = self._ids[UNKNOWN]
        ids = [self._ids.get(word, unknown) for word in words]
        return np.array(ids, token_dtype(self.vocab_size))

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each piece."""
        return [self.encode(piece) for piece in pieces]

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each piece; the bytes of each id are not known."""
        return [(ids, np.zeros(len(ids), np.uint8)) for ids in self.encode_pieces(pieces)]

    def decode(self, ids: Any) -> str:
        """Return the text of a target, without marks."""
        marks = (self.marks.start, self.marks.end)
        kept = [i for i in checked(ids, self).tolist() if i not in marks]
        text = self._models[1].decode([self._pieces.get(i, UNKNOWN) for i in kept])
        return str(text).replace(BLANK, " ").strip()  # of pieces that only the source's model has

    def to_json(self) -> dict[str, Any]:
        """Return the value from which the constructor builds an equal tokenizer."""
        return dict(self._value)


def value_of(files: Mapping[str, bytes], vocab: Mapping[str, int], name: str) -> dict[str, Any]:
    """Return the JSON value of a tokenizer, without its marks.

    `files` are the models of "source" and "target". Raises ConfigError for a table that is none.
    """
    if UNKNOWN not in vocab or not all(type(number) is int for number in vocab.values()):
        raise ConfigError(f"{name} is no table of pieces and ids with {UNKNOWN} among them")
    models = {side: base64.b64encode(data).decode() for side, data in files.items()}
    model = {"type": "SentencePieces", "vocab": dict(vocab)}
    return {"kind": "pieces", "name": name, "tokenizer": {"model": model, **models}}
