"""Options of the data to learn from."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, ClassVar

from minillm.base.record import Record, option
from minillm.data.sources import BUILT_IN


class SourceOptions(Record):
    """Base of the options that name what a run learns from."""

    TRAINS: ClassVar[tuple[str, ...]] = ()
    """Options that name the training data: defaults of a run from old weights."""
    MEASURES: ClassVar[tuple[str, ...]] = ()
    """Options that name held-out data."""
    FIXED: ClassVar[tuple[str, ...]] = ()
    """Options that give ids their meaning: weights cannot change them."""
    NAMED: ClassVar[Collection[str]] = ()
    """Names of built-in data, which are no paths."""

    def located(self) -> dict[str, Any]:
        """Return the data that are named: a built-in name, or an absolute path."""
        values = self.to_dict()
        given = {name: values[name] for name in (*self.TRAINS, *self.MEASURES)}
        return {
            name: value if value in self.NAMED else os.path.abspath(os.path.expanduser(value))
            for name, value in given.items()
            if value is not None
        }


@dataclass(frozen=True, kw_only=True)
class DataOptions(SourceOptions):
    """Text and tokens, as in `--data book.txt --tokenizer char` (README: Your own data)."""

    TRAINS: ClassVar[tuple[str, ...]] = ("data",)
    MEASURES: ClassVar[tuple[str, ...]] = ("val_data",)
    FIXED: ClassVar[tuple[str, ...]] = ("tokenizer",)
    NAMED: ClassVar[Collection[str]] = BUILT_IN

    data: str = option("stdlib", announced=True, path=True)
    """Text to learn: stdlib (the source of Python's standard library), austen (a novel, included),
    shakespeare (fetched once), a text file, a folder of texts, a pattern such as 'src/**/*.py', or
    a .bin or .npy file of tokens."""
    val_data: str | None = option(None, resumable=True, path=True)
    """Held-out text or tokens of its own, named as for --data; left out: the end of the text, or
    val.bin beside train.bin."""
    text_field: str = option("text", announced=True)
    """Field of .jsonl lines, or column of .parquet files, that holds the text."""
    tokenizer: str | None = option(None, path=True)
    """Tokens of the text: byte, char, bpe:SIZE or wordpiece:SIZE (learnt from it), or the path of a
    tokenizer.json, a vocab.txt, or a folder with one; left out: byte for text, none for files of
    tokens."""
    cache: str | None = option(None, resumable=True, path=True)
    """Folder for tokenized texts, which later starts map; left out: minillm in $XDG_CACHE_HOME or
    ~/.cache."""
