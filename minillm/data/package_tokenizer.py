"""Tokenizers of a tokenizer.json: minillm's own, or those of the optional package `tokenizers`.

The package encodes what `OwnTokenizer` does not: SentencePiece models, other pre-tokenizers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np

from minillm.base.errors import ConfigError
from minillm.tokenizers.model import Spans
from minillm.tokenizers.own import OwnTokenizer, bytes_up_to
from minillm.tokenizers.pieces import checked, cut_pieces, token_dtype
from minillm.tokenizers.settings import plain_settings, vocabulary_size
from minillm.tokenizers.unsupported import Unsupported

NEED_PACKAGE = (
    "the package 'tokenizers' is not installed; install it with: "
    "pip install 'minillm-mpi[tokenizers]'"
)


class PackageMissing(ConfigError):
    """Package `tokenizers` that is not installed."""


class HFTokenizer:
    """Tokenizer of the package `tokenizers`, such as a byte-pair encoding.

    Settings of the file that serve other programs are switched off: truncation and padding change
    the number of tokens of a text, and dropout gives every rank other tokens.
    """

    note = ""
    """Line for the user about the choice of this tokenizer."""
    more: Mapping[str, Any] = MappingProxyType({})
    """Facts of the vocabulary that checkpoints keep beside it (minillm/weights/turns.py)."""

    def __init__(self, definition: Mapping[str, Any], name: str) -> None:
        """Build the tokenizer from the value of a tokenizer.json.

        Raises ConfigError if the package is missing, the value is not a tokenizer, or its largest
        id is far above its number of tokens.
        """
        package = _package()
        self.name = name
        self.rules = f"tokenizers {package.__version__}"
        """Program that decides about the ids, with its version."""
        plain, self.switched_off = plain_settings(definition)
        with self._errors("is not a tokenizer of the 'tokenizers' package"):
            self._tokenizer = package.Tokenizer.from_str(json.dumps(plain))
            ids = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = vocabulary_size(name, ids)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text`, without special tokens.

        Long texts are cut into `cut_pieces`. Raises ConfigError for a text that the package cannot
        encode.
        """
        parts = [self.encode_pieces([piece])[0] for piece in cut_pieces([text])]
        return np.concatenate(parts) if parts else np.empty(0, token_dtype(self.vocab_size))

    def encode_pieces(self, pieces: Sequence[str]) -> list[np.ndarray]:
        """Return the ids of each piece; the package encodes them in parallel."""
        dtype = token_dtype(self.vocab_size)
        with self._errors("cannot encode the text"):
            found = self._tokenizer.encode_batch_fast(list(pieces), add_special_tokens=False)
        return [np.array(each.ids, dtype) for each in found]

    def encode_measured(self, pieces: Sequence[str]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Return the ids of each piece, and the bytes up to the end of each from the end before.

        A token stands for the characters since the token before it, so that what the tokenizer
        drops is counted as well.
        """
        with self._errors("cannot encode the text"):
            found = self._tokenizer.encode_batch(list(pieces), add_special_tokens=False)
        return [self._measured(*each) for each in zip(pieces, found, strict=True)]

    def spans(self, text: str) -> Spans:
        """Return the ids of `text` and the characters that each stands for: text[start:end]."""
        with self._errors("cannot encode the text"):
            found = self._tokenizer.encode(text, add_special_tokens=False)
        places = np.array(found.offsets, np.int64).reshape(-1, 2)
        return Spans(np.array(found.ids, np.int64), places[:, 0], places[:, 1])

    def _measured(self, piece: str, found: Any) -> tuple[np.ndarray, np.ndarray]:
        ends = np.fromiter((end for _, end in found.offsets), np.int64, len(found.ids))
        return np.array(found.ids, token_dtype(self.vocab_size)), bytes_up_to(piece, ends)

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
            return self._tokenizer.decode(checked(ids, self).tolist(), skip_special_tokens=False)

    def token_id(self, token: str) -> int | None:
        """Return the id of a token as the vocabulary spells it, None if it has none."""
        return self._tokenizer.token_to_id(token)

    def token(self, token_id: int) -> str:
        """Return a token as the vocabulary spells it, "" for an id without one."""
        return self._tokenizer.id_to_token(token_id) or ""

    def to_json(self) -> dict[str, Any]:
        definition = json.loads(self._tokenizer.to_str())
        return {"kind": "hf", "name": self.name, "tokenizer": definition, **self.more}


def tokenizer_of(definition: Mapping[str, Any], name: str) -> OwnTokenizer | HFTokenizer:
    """Return the tokenizer of a tokenizer.json: minillm's own where it can encode it.

    Raises ConfigError for a value that is no tokenizer, and if the package is needed and missing.
    """
    try:
        return OwnTokenizer(definition, name)
    except Unsupported as part:
        lacking = f"{name} has {part}, which minillm does not encode by itself"
    try:
        found = HFTokenizer(definition, name)
    except PackageMissing as error:
        raise ConfigError(f"{lacking}; {error}") from None
    found.note = f"{lacking}; the package 'tokenizers' does"
    return found


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise PackageMissing(NEED_PACKAGE) from None
    return tokenizers
