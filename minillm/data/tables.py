"""Tables of texts: TSV, CSV and JSON lines, plain or .gz, with file and line in every error.

A TSV has no quotes, as in GLUE. A CSV is that of RFC 4180: a quoted field may hold line ends. Both
begin with the names of their columns, unless columns are asked for by number.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from minillm.base.errors import ConfigError
from minillm.base.record import or_list

LONGEST_FIELD = 1 << 24  # characters; the csv module's own limit is 131,072


class Row(NamedTuple):
    """Row of a table."""

    line: int  # on which it begins, from 1
    values: tuple[Any, ...]  # of the columns that were asked for


class Column(NamedTuple):
    """Column to read."""

    flag: str  # that names it, for errors
    asked: str | None  # name, or number from 1; None: the first of `usual` that exists
    usual: tuple[str, ...]
    optional: bool = False  # its values are None where it is neither asked for nor there

    @property
    def may_lack(self) -> bool:
        """True if a table may be without it."""
        return self.optional and self.asked is None


def read_table(name: str, columns: Sequence[Column]) -> list[Row]:
    """Return the rows of a table, each with the values of `columns`.

    Values are text, those of JSON lines any JSON. Raises ConfigError with file and line for a file
    that cannot be read, has no row, or has rows of different lengths, and for a missing column.
    """
    path = Path(name)
    if not is_table(name):
        raise ConfigError(
            f"{path} is no table: its name must end in {or_list(KINDS)}, each also with .gz"
        )
    rows = list(KINDS[ending(name)](path, read_text(path), columns))
    if not rows:
        raise ConfigError(f"{path} has no row; give it at least one below the names of its columns")
    return rows


def is_table(name: str) -> bool:
    """Return whether a file is named like a table."""
    return ending(name) in KINDS


def ending(name: str) -> str:
    """Return the ending of a file's name, in small letters and without .gz."""
    path = Path(name)
    return Path(path.stem if path.suffix == ".gz" else path).suffix.lower()


def refuse_json(name: str) -> None:
    """Raise ConfigError for a file of JSON as a whole, which has no examples line by line."""
    if ending(name) == ".json":
        raise ConfigError(
            f"{name} is JSON as a whole, the format of questions about contexts; for other tasks "
            "use .jsonl, with an object on each line"
        )


def read_text(path: Path) -> str:
    """Return the text of a file. Raises ConfigError if it cannot be read or is not UTF-8."""
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if path.suffix == ".gz" else data
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(
            f"cannot read {path}: {getattr(error, 'strerror', None) or error}; check the name, or "
            "fetch the file again"
        ) from None
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(
            f"line {line} of {path} is not UTF-8 (byte {error.start} of the file is "
            f"0x{data[error.start]:02x}); convert it, as in: iconv -f latin1 -t utf-8"
        ) from None


def _delimited(
    path: Path, columns: Sequence[Column], records: Iterator[tuple[int, list[str]]]
) -> Iterator[Row]:
    """Yield the rows of `records`, pairs of a line and its fields, the first one of names."""
    found = next(records, None)
    if found is None:
        raise ConfigError(f"{path} is empty; give it a line with the names of its columns")
    line, header = found
    places = _places(path, columns, header)
    wanted = [column.asked for column in columns if not column.may_lack]
    if any(asked in header or not (asked or "").isdigit() for asked in wanted):
        found = next(records, None)
    while found is not None:
        line, fields = found
        if fields in ([], [""]) and len(header) > 1:
            raise ConfigError(f"line {line} of {path} is empty; remove it")
        if len(fields) != len(header):
            raise ConfigError(
                f"line {line} of {path} has {_fields(len(fields))}, but the first line has "
                f"{len(header)}"
            )
        yield Row(line, tuple(None if place is None else fields[place] for place in places))
        found = next(records, None)


def _places(path: Path, columns: Sequence[Column], header: Sequence[str]) -> list[int | None]:
    """Return the index of each column. Raises ConfigError naming one that does not exist."""
    places = list[int | None]()
    for column in columns:
        flag, asked, usual, _ = column
        names = usual if asked is None else (asked,)
        own = [header.index(name) for name in names if name in header]
        if not own and asked is not None and asked.isdigit() and 0 < int(asked) <= len(header):
            own = [int(asked) - 1]
        if not own and not column.may_lack:
            raise ConfigError(
                f"line 1 of {path} names no column {or_list(names)}, only "
                f"{', '.join(map(repr, header))}; pass one of them as {flag}, or the number of a "
                "column where the first line has no names"
            )
        places.append(own[0] if own else None)
    return places


def _fields(number: int) -> str:
    return f"{number} field{'s' * (number != 1)}"


def _tsv(path: Path, text: str, columns: Sequence[Column]) -> Iterator[Row]:
    lines = text.split("\n")
    if lines and not lines[-1]:
        lines.pop()  # behind the last line end
    records = ((i, line.removesuffix("\r").split("\t")) for i, line in enumerate(lines, 1))
    return _delimited(path, columns, records)


def _csv(path: Path, text: str, columns: Sequence[Column]) -> Iterator[Row]:
    return _delimited(path, columns, _csv_records(path, text))


def _csv_records(path: Path, text: str) -> Iterator[tuple[int, list[str]]]:
    csv.field_size_limit(LONGEST_FIELD)
    reader, line = csv.reader(io.StringIO(text, newline=""), strict=True), 1
    try:
        for fields in reader:
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise ConfigError(f"line {line} of {path} is no CSV: {error}") from None


def _json_lines(path: Path, text: str, columns: Sequence[Column]) -> Iterator[Row]:
    for line, content in enumerate(text.split("\n"), 1):
        if not content.strip():
            continue
        try:
            found = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"line {line} of {path} is no JSON: {error}") from None
        if not isinstance(found, dict):
            raise ConfigError(
                f"line {line} of {path} is no JSON object, as in "
                '{"text": "a fine film", "label": "good"}'
            )
        values = []
        for column in columns:
            flag, asked, usual, _ = column
            names = usual if asked is None else (asked,)
            own = [name for name in names if name in found]
            if not own and not column.may_lack:
                raise ConfigError(
                    f"line {line} of {path} has no field {or_list(names)}, only "
                    f"{', '.join(map(repr, found)) or 'none'}; pass another name as {flag}"
                )
            values.append(found[own[0]] if own else None)
        yield Row(line, tuple(values))


Reader = Callable[[Path, str, Sequence[Column]], Iterator[Row]]
KINDS: dict[str, Reader] = {".tsv": _tsv, ".csv": _csv, ".jsonl": _json_lines}
"""Ending of a name -> its reader."""
