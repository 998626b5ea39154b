"""GGUF files: metadata and tensors, read by blocks and written as a stream.

The format is a magic number, a version, counts, the metadata, the places of the tensors, and their
data, aligned (docs/gguf.md of ggml).
"""

from __future__ import annotations

import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from minillm.base.errors import CheckpointError
from minillm.layout.sharding import Slices
from minillm.weights.ggml import FORMATS, OTHERS, Format

MAGIC, VERSION, ALIGNMENT = b"GGUF", 3, 32
MOST = 1 << 26  # entries of an array, names, bytes of a text: larger counts are damage
STRING, ARRAY, BOOL = 8, 9, 7
# Number of a type in the metadata -> its code in the module struct.
SCALARS = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    BOOL: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}


class Entry(NamedTuple):
    """Tensor of a file."""

    shape: tuple[int, ...]  # rows first, as in NumPy: the reverse of the file's
    form: Format
    start: int  # bytes from the beginning of the file


class GGUFFile:
    """File whose metadata are read at once, and its tensors by blocks through a memory map.

    The constructor raises CheckpointError for a file that is truncated, is not of the format, or
    holds a number format that is not read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._bytes = np.memmap(path, np.uint8, "r")
            self.metadata, self.entries = _Reader(path, self._bytes).whole()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, struct.error, RecursionError) as error:  # arrays of arrays of ...
            raise CheckpointError(f"{path} is truncated, or no GGUF file: {error}") from None

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """Return a block of a tensor as floats. Blocks of the format are decoded whole."""
        shape, form, start = self.entries[name]
        per_row = shape[-1] // form.values
        num_bytes = math.prod(shape[:-1]) * per_row * form.num_bytes
        raw = self._bytes[start : start + num_bytes]
        raw = raw.reshape(*shape[:-1], per_row, form.num_bytes)
        *rows, last = slices
        first, end = last.start // form.values, -(-last.stop // form.values)
        values = form.decode(np.asarray(raw[(*rows, slice(first, end))]))
        values = values.reshape(*values.shape[:-2], -1)
        return values[..., last.start - first * form.values : last.stop - first * form.values]


class _Reader:
    """Reader of the part before the data. Raises ValueError with what is wrong."""

    def __init__(self, path: Path, raw: np.ndarray) -> None:
        self.path, self.raw, self.size, self.at = path, raw.data, len(raw), 0

    def whole(self) -> tuple[dict[str, Any], dict[str, Entry]]:
        """Return the metadata and the tensors by name."""
        if self._bytes(4) != MAGIC:
            raise ValueError("it does not begin with GGUF")
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ValueError(f"its version is {version}, and 2 and 3 are read")
        num_tensors, num_values = self._count(), self._count()
        metadata = {}
        for _ in range(num_values):
            name = self._text()
            metadata[name] = self._value(self._scalar("<I"))
        places = [self._place() for _ in range(num_tensors)]
        alignment = metadata.get("general.alignment", ALIGNMENT)
        if type(alignment) is not int or alignment < 1:
            raise ValueError(f"general.alignment is {alignment!r}")
        begin = -(-self.at // alignment) * alignment
        return metadata, {place[0]: self._entry(begin, *place) for place in places}

    def _place(self) -> tuple[str, tuple[int, ...], int, int]:
        name, num_dims = self._text(), self._scalar("<I")
        if not 1 <= num_dims <= 8:
            raise ValueError(f"{name} has {num_dims} dims")
        shape = tuple(self._scalar("<Q") for _ in range(num_dims))[::-1]
        return name, shape, self._scalar("<I"), self._scalar("<Q")

    def _entry(
        self, begin: int, name: str, shape: tuple[int, ...], number: int, offset: int
    ) -> Entry:
        if number not in FORMATS:
            kind = OTHERS.get(number, f"of type {number}")
            raise CheckpointError(
                f"{self.path}: its {name} is {kind}, and only "
                f"{', '.join(f.name for f in FORMATS.values())} are read; take another file of "
                "this model"
            )
        form, start = FORMATS[number], begin + offset
        if shape[-1] % form.values:
            raise ValueError(f"rows of {shape[-1]} values of {name} are no {form.name} blocks")
        end = start + math.prod(shape) // form.values * form.num_bytes
        if end > self.size:
            raise ValueError(f"{name} ends at byte {end} of {self.size}")
        return Entry(shape, form, start)

    def _value(self, kind: int) -> Any:
        if kind in SCALARS:
            return self._scalar(SCALARS[kind])
        if kind == STRING:
            return self._text()
        if kind != ARRAY:
            raise ValueError(f"its metadata have a value of type {kind}")
        kind, count = self._scalar("<I"), self._count()
        if kind in SCALARS:
            dtype = np.dtype(SCALARS[kind])
            return np.frombuffer(self._bytes(count * dtype.itemsize), dtype).tolist()
        # A vocabulary has 10^5 texts: without a call for each.
        return self._texts(count) if kind == STRING else [self._value(kind) for _ in range(count)]

    def _texts(self, count: int) -> list[str]:
        raw, at, found = self.raw, self.at, []
        for _ in range(count):
            end = at + 8 + int.from_bytes(raw[at : at + 8], "little")
            if end > self.size:
                break
            found.append(str(raw[at + 8 : end], "utf-8", "surrogateescape"))
            at = end
        self.at = at if len(found) == count else self.size + 1
        self._bytes(0)
        return found

    def _scalar(self, code: str) -> Any:
        return struct.unpack(code, self._bytes(struct.calcsize(code)))[0]

    def _count(self) -> int:
        count = self._scalar("<Q")
        if count > MOST:
            raise ValueError(f"it has a count of {count}")
        return int(count)

    def _text(self) -> str:
        return self._bytes(self._count()).decode("utf-8", "surrogateescape")

    def _bytes(self, count: int) -> bytes:
        start, self.at = self.at, self.at + count
        if self.at > self.size:
            raise ValueError(f"it ends after {self.size} bytes, amid its metadata")
        return bytes(self.raw[start : self.at])


# ---- writing


def write(
    path: Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, tuple[Format, tuple[int, ...]]],
    blocks: Iterable[np.ndarray],
) -> None:
    """Write a file and sync it.

    Values of `metadata` are texts, bools, ints (as uint32), floats (float32), or lists of one of
    them, ints as int32. `blocks` are float32 rows of the tensors, in their order; a tensor's blocks
    hold whole rows. Raises OSError.
    """
    with path.open("wb") as stream:
        stream.write(MAGIC + struct.pack("<IQQ", VERSION, len(tensors), len(metadata)))
        for name, value in metadata.items():
            stream.write(_text(name) + _typed(value))
        offset = 0
        sizes = []
        for name, (form, shape) in tensors.items():
            dims = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
            stream.write(_text(name) + dims + struct.pack("<IQ", form.number, offset))
            sizes.append(math.prod(shape) // form.values * form.num_bytes)
            offset += -(-sizes[-1] // ALIGNMENT) * ALIGNMENT
        _pad(stream)
        pieces = iter(blocks)
        for (form, _), size in zip(tensors.values(), sizes, strict=True):
            for raw in _encoded(form, size, pieces):
                stream.write(raw)
            _pad(stream)
        stream.flush()
        os.fsync(stream.fileno())


def _encoded(form: Format, size: int, blocks: Iterator[np.ndarray]) -> Iterator[memoryview]:
    """Yield the bytes of one tensor, `size` in all, from the next of `blocks`."""
    assert form.encode is not None
    while size > 0:
        block = next(blocks)
        raw = form.encode(block.astype(np.float32, copy=False).reshape(-1, form.values))
        size -= raw.nbytes
        yield np.ascontiguousarray(raw).reshape(-1).data
    assert size == 0, "a block reaches beyond its tensor"


def _pad(stream: BinaryIO) -> None:
    stream.write(bytes(-stream.tell() % ALIGNMENT))


def _text(value: str) -> bytes:
    raw = value.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(raw)) + raw


def _typed(value: Any) -> bytes:
    """Return the number of the type of a value, and the value."""
    if isinstance(value, list):
        kind = _plain(value[0], 5)[0] if value else STRING
        items = [_plain(item, 5)[1] for item in value]
        return struct.pack("<IIQ", ARRAY, kind, len(value)) + b"".join(items)
    kind, raw = _plain(value, 4)
    return struct.pack("<I", kind) + raw


def _plain(value: Any, whole: int) -> tuple[int, bytes]:
    if isinstance(value, str):
        return STRING, _text(value)
    kind = BOOL if isinstance(value, bool) else 6 if isinstance(value, float) else whole
    return kind, struct.pack(SCALARS[kind], value)
