"""Pieces of a text, and conversions between text and numbers that tokenizers share."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

import numpy as np

from minillm.base.errors import ConfigError

PIECE_CHARACTERS = 1 << 18  # a piece; byte-pair encoding needs hundreds of bytes a character


class Named(Protocol):
    """Vocabulary with a name for messages."""

    @property
    def name(self) -> str:
        """Name for messages."""

    @property
    def vocab_size(self) -> int:
        """Number of ids."""


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the smallest unsigned dtype that holds ids below `vocab_size`."""
    return np.dtype(
        np.uint8 if vocab_size <= 1 << 8 else np.uint16 if vocab_size <= 1 << 16 else np.uint32
    )


def cut_pieces(blocks: Iterable[str]) -> Iterator[str]:
    """Cut a text into pieces that are encoded one by one, whatever its blocks are.

    With S = 2^18, a piece ends after the first line end at or behind its S-th character. If there
    is none before its 2S-th, it ends before the last blank there, else at the 2S-th character. No
    piece depends on the number of ranks.
    """
    size, buffer = PIECE_CHARACTERS, ""
    for block in blocks:
        buffer += block
        while stop := _piece_end(buffer, size):
            yield buffer[:stop]
            buffer = buffer[stop:]
    if buffer:
        yield buffer


def _piece_end(text: str, size: int) -> int:
    """Return the end of the first piece of `text`; 0 if more of it must be seen."""
    line_end = text.find("\n", size - 1, 2 * size)
    if line_end >= 0 or len(text) < 2 * size:
        return line_end + 1
    blank = text.rfind(" ", size, 2 * size)
    return blank if blank > 0 else 2 * size


def encoded(text: str, codec: str = "utf-8") -> bytes:
    """Return the bytes of `text`. Raises ConfigError for half of a surrogate pair."""
    try:
        return text.encode(codec)
    except UnicodeEncodeError as error:
        code = f"U+{ord(text[error.start]):04X} at position {error.start}"
        raise ConfigError(
            f"the text has {code}, half of a surrogate pair and no character; remove it "
            "(a terminal or file in another encoding?)"
        ) from None


def utf8_lengths(points: np.ndarray) -> np.ndarray:
    """Return the bytes of each code point in UTF-8."""
    return 1 + (points > 0x7F) + (points > 0x7FF) + (points > 0xFFFF)


def code_points(text: str) -> np.ndarray:
    """Return the code points of `text`, uint32. Raises ConfigError for a lone surrogate."""
    return np.frombuffer(encoded(text, "utf-32-le"), np.uint32)


def characters_of(points: np.ndarray) -> str:
    """Return the text of code points."""
    return points.astype("<u4").tobytes().decode("utf-32-le")


def checked(ids: Any, tokenizer: Named) -> np.ndarray:
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


def shortened(text: str, limit: int = 60) -> str:
    """Return `text`, or its beginning and dots, for messages."""
    return text if len(text) <= limit else text[: limit - 3] + "..."
