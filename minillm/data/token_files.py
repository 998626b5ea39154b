"""Memory-mapped files of token ids: `.npy`, and `.bin` as written by nanoGPT and llm.c.

nanoGPT's `.bin` holds uint16 ids and no header. llm.c's has a header of 256 int32: a magic number,
which determines the dtype, the version, and the number of tokens.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.sources import reading

HEADER_BYTES = 256 * 4
LLMC_FORMATS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic number: (version, dtype)

CHECKED_TOKENS = 1 << 22  # checked at once in the pass over a whole file
FINGERPRINT_SAMPLES = 64  # samples of a file in its fingerprint
SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class TokenFacts:
    """Summary of a token file, from one pass over it."""

    sha256: str  # of the ids in file order, as little-endian bytes
    largest: int  # the largest id
    position: int  # of the first token with the largest id


def open_tokens(path: Path) -> np.ndarray:
    """Map the ids in `path` read-only: any integer dtype, [N].

    Only the pages that are accessed are read. Raises ConfigError for a file that is missing, empty
    or of the wrong kind, ends within a token, or has a header that contradicts its length.
    """
    with reading(path):
        tokens = _open_npy(path) if path.suffix == ".npy" else _open_bin(path)
    if tokens.size == 0:
        raise ConfigError(
            f"{path} is empty: it holds no token ids; write it again, or name another file"
        )
    return tokens


def held_out_beside(path: Path) -> Path | None:
    """Return the file of held-out tokens beside `path`, or None.

    It is val.bin for train.bin, x_val.npy for x_train.npy.
    """
    if not path.stem.endswith("train"):
        return None
    sibling = path.with_name(path.stem.removesuffix("train") + "val" + path.suffix)
    return sibling if sibling.is_file() else None


def inspect_tokens(tokens: np.ndarray, path: Path) -> TokenFacts:
    """Hash the ids [N] and find the largest, in one pass.

    Raises ConfigError for a negative id.
    """
    digest = hashlib.sha256()
    largest, position = -1, 0
    for start in range(0, len(tokens), CHECKED_TOKENS):
        block = np.ascontiguousarray(tokens[start : start + CHECKED_TOKENS])
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
    """Hash the length and 64 evenly spaced samples of the ids [N].

    The ranks compare it, because hashing the whole file on every rank takes too long.
    """
    step = max(1, SAMPLE_BYTES // tokens.dtype.itemsize)
    digest = hashlib.sha256(f"{len(tokens)} {tokens.dtype.itemsize}".encode())
    last = max(0, len(tokens) - step)
    for start in np.unique(np.linspace(0, last, FINGERPRINT_SAMPLES).astype(np.int64)):
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
        array = isinstance(tokens, np.ndarray)
        found = f"{tokens.dtype} {list(tokens.shape)}" if array else "an archive"
        raise ConfigError(f"{path} holds {found}; token ids are integers [N], such as uint16")
    return tokens


def _open_bin(path: Path) -> np.ndarray:
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return np.empty(0, np.uint16)
    has_header = num_bytes >= HEADER_BYTES
    magic, version, length = map(int, np.fromfile(path, "<i4", count=3) if has_header else (0,) * 3)
    if magic in LLMC_FORMATS and version == LLMC_FORMATS[magic][0]:
        dtype = np.dtype(LLMC_FORMATS[magic][1])
        count = (num_bytes - HEADER_BYTES) // dtype.itemsize
        if length != count:
            raise ConfigError(
                f"{path} says it holds {length} tokens, but its {num_bytes} bytes hold {count}; it "
                "was cut short or altered"
            )
        if not count:
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(count,))
    if num_bytes % 2:
        raise ConfigError(
            f"{path} has {num_bytes} bytes, an odd number; a .bin file holds uint16 token ids, two "
            "bytes each"
        )
    return np.memmap(path, np.dtype("<u2"), mode="r")
