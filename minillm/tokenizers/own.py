"""Tokenizer of a tokenizer.json: byte-level BPE or WordPiece, with added tokens and offsets."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from minillm.base.errors import ConfigError
from minillm.tokenizers.added import AddedTokens
from minillm.tokenizers.bpe import BPE
from minillm.tokenizers.model import Model, Spans
from minillm.tokenizers.pieces import (
    checked,
    code_points,
    cut_pieces,
    encoded,
    token_dtype,
    utf8_lengths,
)
from minillm.tokenizers.settings import check_ids, plain_settings, vocabulary_size
from minillm.tokenizers.unicode import VERSION
from minillm.tokenizers.unsupported import Unsupported, require
from minillm.tokenizers.wordpiece import WordPiece

MODELS: dict[str, type[BPE] | type[WordPiece]] = {"BPE": BPE, "WordPiece": WordPiece}


class OwnTokenizer:
    """Tokenizer of a tokenizer.json, without special tokens around a text.

    Truncation, padding and dropout of the file are switched off.
    """

    rules = f"minillm, Unicode {VERSION}"
    """Program that decides about the ids, with what may change them."""
    more: Mapping[str, Any] = MappingProxyType({})
    """Facts of the vocabulary that checkpoints keep beside it (minillm/weights/turns.py)."""

    def __init__(self, definition: Mapping[str, Any], name: str) -> None:
        """Build the tokenizer from the value of a tokenizer.json.

        Raises Unsupported for kinds beyond `MODELS` and for other parts that are not implemented,
        ConfigError for a value that is no tokenizer, or whose largest id is far too large.
        """
        self.name = name
        try:
            self._definition, self.switched_off = plain_settings(definition)
            kind = self._definition["model"].get("type")
            require(kind in MODELS, f"the model {kind}")
            normalizes = self._definition.get("normalizer") is not None
            added = self._definition.get("added_tokens") or ()
            check_ids(self._definition["model"], added)
            self._added = AddedTokens(added, normalizes)
            self._model: Model = MODELS[kind](self._definition)
            self._ids = {**self._model.vocab, **self._added.ids}
            self.vocab_size = vocabulary_size(name, self._ids)
            self._tokens = dict(zip(self._ids.values(), self._ids, strict=True))
        except Unsupported:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__} {error}".strip()
            raise ConfigError(
                f"{name} is not a tokenizer: {reason}; fetch it again, or choose byte or char"
            ) from None

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, without special tokens around it.

        Long texts are cut into `cut_pieces`. Raises ConfigError for half of a surrogate pair.
        """
        parts = self.encode_pieces(list(cut_pieces([text])))
        return np.concatenate(parts) if parts else np.empty(0, token_dtype(self.vocab_size))

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each piece of a text."""
        return [self._ids_of(piece) for piece in pieces]

    def _ids_of(self, piece: str) -> np.ndarray:
        _check(piece)
        parts = (
            self._model.ids(part.text) if part.token is None else (part.token,)
            for part in self._added.split(piece)
        )
        return np.array(list(itertools.chain.from_iterable(parts)), token_dtype(self.vocab_size))

    def spans(self, text: str) -> Spans:
        """Return the ids of `text` and the characters that each stands for: text[start:end].

        The places are those in `text` as given, whatever normalization does with it.
        """
        _check(text)
        found = [Spans(*(np.empty(0, np.int64) for _ in range(3)))]
        for part in self._added.split(text):
            if part.token is None:
                ids, starts, ends = self._model.spans(part.text)
                found.append(Spans(ids, starts + part.start, ends + part.start))
            else:
                end = part.start + len(part.text)
                found.append(Spans(*(np.array([n]) for n in (part.token, part.start, end))))
        return Spans(*map(np.concatenate, zip(*found, strict=True)))

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each piece, and the bytes up to the end of each from the end before.

        A token stands for the characters since the token before it, so that what the tokenizer
        drops is counted as well.
        """
        return [self._measured(piece) for piece in pieces]

    def _measured(self, piece: str) -> tuple[np.ndarray, np.ndarray]:
        ids, _, ends = self.spans(piece)
        return ids.astype(token_dtype(self.vocab_size)), bytes_up_to(piece, ends)

    def decode(self, ids: Any) -> str:
        """Return the text, including special tokens."""
        found = (self._tokens.get(number) for number in checked(ids, self).tolist())
        return self._model.decode([token for token in found if token is not None])

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, None if it has none."""
        return self._ids.get(token)

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it, "" for an id without one."""
        return self._tokens.get(token_id, "")

    def to_json(self) -> dict[str, Any]:
        return {"kind": "hf", "name": self.name, "tokenizer": self._definition, **self.more}


def bytes_up_to(piece: str, ends: np.ndarray) -> np.ndarray:
    """Return the UTF-8 bytes of `piece` up to each of `ends` [N] from the one before, uint32 [N].

    The last one counts all that is left.
    """
    before = np.zeros(len(piece) + 1, np.int64)  # bytes before each character
    np.cumsum(utf8_lengths(code_points(piece)), out=before[1:])
    reached = before[np.maximum.accumulate(ends)]
    reached[-1:] = before[-1]
    return np.diff(reached, prepend=0).astype(np.uint32)


def _check(text: str) -> None:
    """Raise ConfigError for half of a surrogate pair."""
    if not text.isascii():
        encoded(text)
