"""Tokenizers of the optional package `tokenizers`: byte-pair encodings and others.

They are read from a tokenizer.json, or learnt from a text.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.pieces import checked, code_points, cut_pieces, token_dtype, utf8_lengths

LARGEST_GAP = 1 << 16  # ids without a token that a tokenizer.json may have beyond half of all

NEED_PACKAGE = (
    "the package 'tokenizers' is not installed; install it with: "
    "pip install 'minillm-mpi[tokenizers]'"
)


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

    def _measured(self, piece: str, found: Any) -> tuple[np.ndarray, np.ndarray]:
        bytes_before = np.zeros(len(piece) + 1, np.int64)  # [characters + 1]
        np.cumsum(utf8_lengths(code_points(piece)), out=bytes_before[1:])
        ends = np.fromiter((end for _, end in found.offsets), np.int64, len(found.ids))
        ends = bytes_before[np.maximum.accumulate(ends)]
        ends[-1:] = bytes_before[-1]
        ids = np.array(found.ids, token_dtype(self.vocab_size))
        return ids, np.diff(ends, prepend=0).astype(np.uint32)

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
        return {"kind": "hf", "name": self.name, "tokenizer": json.loads(self._tokenizer.to_str())}


def learn_bpe(spec: str, blocks: Iterable[str]) -> HFTokenizer:
    """Learn the byte-pair encoding `spec`, such as bpe:512, from a text."""
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
    tokenizer.train_from_iterator(cut_pieces(blocks), trainer)
    return HFTokenizer(tokenizer.to_str(), spec)


def read_definition(path: Path) -> HFTokenizer:
    """Read the tokenizer in a tokenizer.json."""
    try:
        path = path.expanduser()
        if not path.is_file():
            raise FileNotFoundError(None, "there is no such file")
        definition = path.read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8 text"
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


def package_version() -> str:
    """Return the version of the package `tokenizers`. Raises ConfigError if it is missing."""
    return str(_package().__version__)


def _package() -> Any:
    try:
        import tokenizers
    except ImportError:
        raise ConfigError(NEED_PACKAGE) from None
    return tokenizers
