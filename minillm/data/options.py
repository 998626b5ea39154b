"""Options of the text to learn from."""

from __future__ import annotations

from dataclasses import dataclass

from minillm.base.record import Record, option


@dataclass(frozen=True, kw_only=True)
class DataOptions(Record):
    """Text and tokens."""

    data: str = option("stdlib", announced=True, path=True)
    """Text to learn: stdlib (the source of Python's standard library), austen (a novel, included),
    shakespeare (fetched once), a text file, a folder of text files, or a .bin or .npy file of
    tokens."""
    tokenizer: str | None = None
    """Tokens of the text: byte, char, or the path of a tokenizer.json; left out: byte for text,
    none for files of tokens."""
