"""Writer of safetensors files, the files of a checkpoint."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.arrays import Array, to_host
from minillm.base.errors import CheckpointError
from minillm.base.whole_file import sync

# NumPy's name of a dtype: its name in a safetensors header.
_DTYPES = {
    "float32": "F32",
    "float64": "F64",
    "float16": "F16",
    "bfloat16": "BF16",
    "int32": "I32",
    "int64": "I64",
    "uint8": "U8",
}

Block = tuple[str, str, Array]
"""Key in the file, dtype name, contents."""


def write_safetensors(path: Path, blocks: Sequence[Block]) -> tuple[int, str]:
    """Write `blocks` as a safetensors file and sync it. Return its size in bytes and its SHA-256.

    The format is a length in 8 bytes, a JSON header, and the arrays back to back
    (https://huggingface.co/docs/safetensors). Copies one block at a time. Raises OSError, and
    CheckpointError for an unsupported dtype.
    """
    header: dict[str, Any] = {}
    offset = 0
    for key, dtype, data in blocks:
        if dtype not in _DTYPES:
            raise CheckpointError(
                f"{key} has dtype {dtype}, which no checkpoint can hold; there are "
                f"{', '.join(_DTYPES)}"
            )
        header[key] = {
            "dtype": _DTYPES[dtype],
            "shape": data.shape,
            "data_offsets": [offset, offset + data.nbytes],
        }
        offset += data.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the arrays start at a multiple of 8
    digest, size = hashlib.sha256(), 0
    with path.open("wb") as stream:
        for chunk in _chunks(text, blocks):
            stream.write(chunk)
            digest.update(chunk)
            size += len(chunk)
        sync(stream)
    return size, digest.hexdigest()


def _chunks(header: bytes, blocks: Sequence[Block]) -> Iterable[bytes | memoryview]:
    yield len(header).to_bytes(8, "little")
    yield header
    for _, _, data in blocks:
        yield np.ascontiguousarray(to_host(data)).reshape(-1).view(np.uint8).data
