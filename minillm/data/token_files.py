"""Files of token ids, mapped into memory rather than read: `.npy`, and `.bin` as nanoGPT and llm.c
write it.

nanoGPT's `.bin` is nothing but uint16 ids. llm.c's has 256 int32 in front, of which the first is a
magic number that tells the version and the dtype.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.base.errors import ConfigError

HEADER_INTS = 256
LLMC_FORMATS = {
    20240520: (1, np.uint16),
    20240801: (7, np.uint32),
}  # magic number: (version, dtype of the ids)

BLOCK = 1 << 22  # tokens looked at together when a whole file is checked
SAMPLES = 64  # blocks that a fingerprint covers
SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class TokenFacts:
    """What one pass over a token file learns: its SHA-256 (of the ids in file order, as
    little-endian bytes) and the largest id with its position."""

    sha256: str
    largest: int
    position: int


def open_tokens(path: Path) -> np.ndarray:
    """The ids in `path`, integer [N], mapped read-only: only the pages that are looked at are read.

    Raises ConfigError for a file that is missing, empty, of half a token, of the wrong kind, or
    whose header and length disagree.
    """
    try:
        tokens = _open_npy(path) if path.suffix == ".npy" else _open_bin(path)
    except FileNotFoundError:
        raise ConfigError(
            f"{path} is gone: it was there when the run looked for its data, and is not now; put "
            "it back and start again"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"cannot read {path}: {error.strerror or error}; check the file and its permissions"
        ) from None
    if tokens.size == 0:
        raise ConfigError(
            f"{path} is empty: it holds no token ids; write it again, or name another file"
        )
    return tokens


def held_out_beside(path: Path) -> Path | None:
    """The file of held-out tokens that belongs to `path`: val.bin beside train.bin, x_val.npy
    beside x_train.npy; None if there is none."""
    if not path.stem.endswith("train"):
        return None
    sibling = path.with_name(path.stem.removesuffix("train") + "val" + path.suffix)
    return sibling if sibling.is_file() else None


def inspect_tokens(tokens: np.ndarray, path: Path) -> TokenFacts:
    """Hash the ids [N] and find the largest, in one pass by blocks. Raises ConfigError for a
    negative id."""
    digest = hashlib.sha256()
    largest, position = -1, 0
    for start in range(0, len(tokens), BLOCK):
        block = np.ascontiguousarray(tokens[start : start + BLOCK])
        if block.dtype.kind == "i" and block.min() < 0:
            at = int((block < 0).argmax())
            raise ConfigError(
                f"{path} has the token id {int(block[at])} at position {start + at}; ids are 0 or "
                "more"
            )
        at = int(block.argmax())
        if int(block[at]) > largest:
            largest, position = int(block[at]), start + at
        digest.update(block.astype(block.dtype.newbyteorder("<"), copy=False).data)
    return TokenFacts(digest.hexdigest(), largest, position)


def fingerprint(tokens: np.ndarray) -> str:
    """A hash of the length and of 64 evenly spaced blocks of the ids [N]: what ranks compare, where
    reading the whole file on each would take too long."""
    step = max(1, SAMPLE_BYTES // tokens.dtype.itemsize)
    digest = hashlib.sha256(f"{len(tokens)} {tokens.dtype.itemsize}".encode())
    for start in np.unique(np.linspace(0, max(0, len(tokens) - step), SAMPLES).astype(np.int64)):
        digest.update(np.ascontiguousarray(tokens[start : start + step]).data)
    return digest.hexdigest()


def _open_npy(path: Path) -> np.ndarray:
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        if path.stat().st_size == 0:
            return np.empty(0, np.uint16)
        raise ConfigError(f"{path} is not an array file that NumPy can map: {error}") from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        what = (
            f"{tokens.dtype} {list(tokens.shape)}"
            if isinstance(tokens, np.ndarray)
            else "an archive"
        )
        raise ConfigError(
            f"{path} holds {what}; token ids are one row of integers, such as uint16 [N]"
        )
    return tokens


def _open_bin(path: Path) -> np.ndarray:
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return np.empty(0, np.uint16)
    header = (
        np.fromfile(path, "<i4", count=3) if num_bytes >= HEADER_INTS * 4 else np.zeros(3, np.int32)
    )
    if int(header[0]) in LLMC_FORMATS:
        version, kind = LLMC_FORMATS[int(header[0])]
        dtype = np.dtype(kind).newbyteorder("<")
        count = (num_bytes - HEADER_INTS * 4) // dtype.itemsize
        if int(header[1]) == version:
            if int(header[2]) != count:
                raise ConfigError(
                    f"{path} says it holds {int(header[2])} tokens, but its {num_bytes} bytes hold "
                    f"{count}; it was cut short or altered"
                )
            return (
                np.memmap(path, dtype, mode="r", offset=HEADER_INTS * 4, shape=(count,))
                if count
                else np.empty(0, dtype)
            )
    if num_bytes % 2:
        raise ConfigError(
            f"{path} has {num_bytes} bytes, an odd number; a .bin file holds uint16 token ids, two "
            "bytes each"
        )
    return np.memmap(path, np.dtype("<u2"), mode="r")
