"""Safetensors files: read by blocks, written as a stream.

The format is a length in 8 bytes, a JSON header, and the arrays back to back
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from minillm.base.errors import CheckpointError
from minillm.layout.sharding import Slices

DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
NAMES = {str(dtype): name for name, dtype in DTYPES.items()}
MOST_HEADER = 100_000_000  # bytes, the limit of the format


class Entry(NamedTuple):
    """Tensor of a file."""

    dtype: str  # as in the header: F32
    shape: tuple[int, ...]
    start: int  # bytes from the beginning of the file
    num_bytes: int


class SafetensorsFile:
    """File whose tensors are read by blocks, through a memory map.

    The constructor reads the header. Raises CheckpointError for a file that is truncated or is not
    of the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.size = path.stat().st_size
            with path.open("rb") as stream:
                length = int.from_bytes(stream.read(8), "little")
                if not 2 <= length <= min(self.size - 8, MOST_HEADER):
                    raise ValueError(
                        f"it begins with a header of {length} bytes, but has {self.size}"
                    )
                header = json.loads(stream.read(length))
            self.entries = dict(_entries(header, 8 + length, self.size))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from None
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise CheckpointError(
                f"{path} is truncated, or no safetensors file: {error}; fetch it again"
            ) from None
        self._bytes: np.ndarray | None = None

    def dtype(self, name: str) -> np.dtype:
        """Return the dtype of a tensor. Raises CheckpointError for one that is no float."""
        found = self.entries[name].dtype
        if found not in DTYPES:
            raise CheckpointError(
                f"{self.path} holds {name} as {found}; weights can be {', '.join(DTYPES)}"
            )
        return DTYPES[found]

    def read(self, name: str, slices: Slices) -> np.ndarray:
        """Return a block of a tensor, a view of the file. Raises CheckpointError."""
        entry, dtype = self.entries[name], self.dtype(name)
        if self._bytes is None:
            self._bytes = np.memmap(self.path, np.uint8, "r")
        raw = self._bytes[entry.start : entry.start + entry.num_bytes]
        return raw.view(dtype).reshape(entry.shape)[slices]


def _entries(header: Any, begin: int, size: int) -> Iterator[tuple[str, Entry]]:
    """Yield the tensors of a header. Raises ValueError for one that does not lie in the file."""
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        shape, (first, last) = tuple(entry["shape"]), entry["data_offsets"]
        dtype = str(entry["dtype"])
        whole = all(type(n) is int and n >= 0 for n in (*shape, first, last))
        if not whole or not first <= last <= size - begin:
            raise ValueError(
                f"{name} lies at bytes {first} to {last} of {size - begin} bytes of data"
            )
        if dtype in DTYPES and math.prod(shape) * DTYPES[dtype].itemsize != last - first:
            raise ValueError(f"{name} has shape {shape} and {last - first} bytes")
        yield name, Entry(dtype, shape, begin + first, last - first)


def write(
    path: Path,
    tensors: Mapping[str, tuple[str, tuple[int, ...]]],
    blocks: Iterable[np.ndarray],
) -> int:
    """Write a file and sync it; return its bytes of data.

    `tensors` gives the dtype, as in the header, and the shape of each. `blocks` are their elements
    in that order, in the dtype of their tensor. Raises OSError.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, (dtype, shape) in tensors.items():
        end = offset + math.prod(shape) * DTYPES[dtype].itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for block in blocks:
            stream.write(np.ascontiguousarray(block).reshape(-1).view(np.uint8).data)
        written = stream.tell() - 8 - len(text)
        assert written == offset, f"{written} bytes of {offset}"
        stream.flush()
        os.fsync(stream.fileno())
    return offset
