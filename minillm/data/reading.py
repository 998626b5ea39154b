"""Text of a source, in blocks: decoded, checked and never whole in memory.

Plain text may be compressed with gzip. A `.jsonl` file holds a JSON object a line, a `.parquet`
file a row a document (with the extra `parquet`); one field of them is the text. A byte-order mark
is dropped. Documents, and several files, end with a line end each, with two in a source whose
documents stand `apart`.
"""

from __future__ import annotations

import codecs
import contextlib
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from minillm.base.errors import ConfigError
from minillm.data.sources import TextSource, built_in_names, kind_of, shown
from minillm.tokenizers.pieces import encoded

BLOCK_BYTES = 1 << 18
PARQUET_ROWS = 256  # at once
LONGEST_LINE = 1 << 27  # bytes of a document in a .jsonl file

UTF16 = {codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
NUL_SHARE = 0.1  # of a block: text has none, UTF-16 a half, binary files some

NEED_PARQUET = (
    "the package 'pyarrow' is not installed; install it with: pip install 'minillm-mpi[parquet]'"
)


class TextFacts(NamedTuple):
    """Summary of a text, from one pass over it."""

    sha256: str  # of its UTF-8 bytes
    num_characters: int
    num_bytes: int
    notes: list[str]  # for the user: NUL characters by file


def scan(source: TextSource, advance: Callable[[int], Any] = lambda number: None) -> TextFacts:
    """Read a text once and return its facts; `advance` is called with the characters of a block.

    Raises ConfigError as `read_blocks` does, and for a blank text.
    """
    digest, characters, num_bytes, blank = hashlib.sha256(), 0, 0, True
    notes: list[str] = []
    for block in read_blocks(source, notes):
        data = encoded(block)
        digest.update(data)
        characters, num_bytes = characters + len(block), num_bytes + len(data)
        blank = blank and block.isspace()
        advance(len(block))
    if blank:
        size = f"{characters} characters, all blank" if characters else "0 bytes"
        raise ConfigError(
            f"--data {source.name} is empty ({size}); give a text, or choose one of "
            f"{built_in_names()}"
        )
    return TextFacts(digest.hexdigest(), characters, num_bytes, notes)


def read_blocks(source: TextSource, notes: list[str] | None = None) -> Iterator[str]:
    """Yield the concatenated text of all files, in blocks of at most about 2^18 characters.

    A document of a .jsonl or .parquet file is one block. Appends to `notes` a line for each file
    with NUL characters. Raises ConfigError for a file that is missing, unreadable, damaged or not
    UTF-8 (with the position of the first wrong byte).
    """
    several = len(source.files) > 1
    for path in source.files:
        last, zeros = "\n", 0
        for block in _read_file(path, source):
            if zeros_here := block.count("\0"):
                _check_zeros(path, block, zeros_here)
                zeros += zeros_here
            last = block[-1]
            yield block
        if several and last != "\n":
            yield "\n"
        if several and source.apart:
            yield "\n"
        if zeros and notes is not None:
            notes.append(f"{shown(path)} has {zeros:,} NUL characters, which are learnt as text")


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Raise ConfigError naming `path` if the enclosed block cannot read it."""
    try:
        yield
    except FileNotFoundError:
        raise ConfigError(
            f"{shown(path)} is gone: it existed when the run looked for its data; put it back and "
            "start again"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
        damaged = isinstance(error, (EOFError, zlib.error, gzip.BadGzipFile))
        cure = "it is damaged; fetch or write it again" if damaged else "check its permissions"
        raise ConfigError(
            f"cannot read {shown(path)}: {getattr(error, 'strerror', None) or error}; {cure}"
        ) from None


def _read_file(path: Path, source: TextSource) -> Iterator[str]:
    """Yield the text of one file in blocks that are not empty."""
    kind = kind_of(path)
    with reading(path):
        if kind == ".parquet":
            yield from _ended(_parquet_texts(path, source.field), source.apart)
            return
        compressed = path.name.lower().endswith(".gz")
        file: Any
        with gzip.open(path) if compressed else path.open("rb") as file:
            if kind == ".jsonl":
                yield from _ended(_json_texts(path, file, source.field), source.apart)
            else:
                yield from _decoded(path, file)


def _decoded(path: Path, file: BinaryIO) -> Iterator[str]:
    """Yield the characters of a UTF-8 file without its byte-order mark."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    position, more = 0, True
    while more:
        data = file.read(BLOCK_BYTES)
        if position == 0:
            if data[:2] in UTF16:
                raise ConfigError(
                    f"{shown(path)} is UTF-16 text, not UTF-8; convert it with `iconv -f UTF-16 "
                    "-t UTF-8`"
                )
            if data.startswith(codecs.BOM_UTF8):
                data, position = data[3:], 3
        more = bool(data)
        pending = len(decoder.getstate()[0])
        try:
            text = decoder.decode(data, final=not more)
        except UnicodeDecodeError as error:
            at = position - pending + error.start
            raise ConfigError(
                f"{shown(path)} is not UTF-8 text: byte 0x{error.object[error.start]:02x} at "
                f"position {at} ({error.reason}); convert it, for example with `iconv -f LATIN1 -t "
                "UTF-8`, or name token files .bin or .npy"
            ) from None
        position += len(data)
        if text:
            yield text


def _json_texts(path: Path, file: BinaryIO, field: str) -> Iterator[str]:
    """Yield the text field of each line's object; a line that is a JSON string is the text."""
    for number, line in enumerate(iter(lambda: file.readline(LONGEST_LINE), b""), 1):
        if len(line) == LONGEST_LINE:
            raise ConfigError(
                f"{shown(path)} line {number} has {LONGEST_LINE >> 20} MiB or more; a .jsonl file "
                "holds one document a line"
            )
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ConfigError(
                f"{shown(path)} line {number} is not JSON: {str(error).partition(': line')[0]}; a "
                ".jsonl file holds one JSON object a line"
            ) from None
        text = value.get(field) if isinstance(value, dict) else value
        if not isinstance(text, str):
            found = f"it has {', '.join(value)[:200]}" if isinstance(value, dict) else "no object"
            raise ConfigError(
                f"{shown(path)} line {number} has no text in the field {field!r} ({found}); name "
                "the field with --text-field"
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ConfigError(
                f"{shown(path)} line {number} holds half of a surrogate pair, which is no "
                "character; remove it"
            ) from None
        yield text


def _parquet_texts(path: Path, field: str) -> Iterator[str]:
    """Yield the values of one column; null counts as no text."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f"{shown(path)}: {NEED_PARQUET}") from None
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if field not in names:
                raise ConfigError(
                    f"{shown(path)} has no column {field!r} (it has {', '.join(names)[:200]}); "
                    "name the column with --text-field"
                )
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[field]):
                for text in batch.column(0).to_pylist():
                    if text is not None and not isinstance(text, str):
                        raise ConfigError(
                            f"{shown(path)}: the column {field!r} holds {batch.schema.types[0]}, "
                            "not text; name another with --text-field"
                        )
                    yield text or ""
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise ConfigError(
            f"{shown(path)} is not a Parquet file that pyarrow reads: "
            f"{str(error).partition(chr(10))[0]}; fetch or write it again"
        ) from None


def _ended(documents: Iterable[str], apart: bool) -> Iterator[str]:
    """Yield the documents that are not empty, with a line end, and an empty line if `apart`."""
    for text in documents:
        if text:
            yield text + "\n" * (not text.endswith("\n")) + "\n" * apart


def _check_zeros(path: Path, block: str, zeros: int) -> None:
    """Raise ConfigError if so many characters are NUL that the file cannot be text in UTF-8."""
    if zeros > NUL_SHARE * len(block):
        raise ConfigError(
            f"{shown(path)} is not UTF-8 text: {zeros} of {len(block)} characters are NUL; if it "
            "is UTF-16, convert it with `iconv -f UTF-16LE -t UTF-8`; if it holds token ids, name "
            "it .bin or .npy"
        )
