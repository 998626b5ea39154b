"""Memory-mapped files of token ids: `.npy`, and `.bin` as written by nanoGPT and llm.c.

nanoGPT's `.bin` holds uint16 ids and no header. llm.c's has a header of 256 int32: a magic number,
which determines the dtype, the version, and the number of tokens. Headers of other versions and raw
ids of 32 or 64 bits are refused: read as uint16, they would train without an error.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from minillm.base.errors import ConfigError
from minillm.data.reading import reading
from minillm.data.sources import shown

HEADER_BYTES = 256 * 4
LLMC_FORMATS = {20240520: (1, "<u2"), 20240801: (7, "<u4")}  # magic number: (version, dtype)

DATES = range(20200101, 20400101)  # magic numbers of llm.c are dates; these are refused if unknown
OTHER_VERSIONS = 1000  # versions below this are taken for the second word of a header

WIDE_SAMPLE = 1 << 20  # uint16 values that are looked at for ids of 32 bits
WIDE_HIGH = 15  # largest upper half of an id below 2^20

LARGEST_VOCABULARY = 1 << 20  # tokens; four times the largest published vocabulary

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


def length_check(tokens: np.ndarray) -> Callable[[], None] | None:
    """Return a function that raises ConfigError if the file of mapped `tokens` was cut short.

    Tokens in memory need none: None.

    The processor ends a process that reads a page behind the end of a mapped file. The look at the
    length takes a microsecond. A file that is replaced or deleted keeps its pages.
    """
    name, base = getattr(tokens, "filename", None), tokens.base
    while isinstance(base, np.ndarray):
        base = base.base
    if not isinstance(base, mmap.mmap):
        return None
    mapping: mmap.mmap = base

    def check() -> None:
        size = mapping.size()
        if size < len(mapping):
            raise ConfigError(
                f"{shown(name or 'the token file')} was cut to {size} bytes while "
                f"this run reads its {len(mapping)} bytes; put the whole file back, and go on with "
                "--resume"
            )

    return check


def _open_npy(path: Path) -> np.ndarray:
    with path.open("rb") as file:
        start = file.read(6)
    if not start:
        return np.empty(0, np.uint16)
    if start != b"\x93NUMPY":
        raise ConfigError(
            f"{path} is not an array file: it does not begin as NumPy's .npy files do; name it "
            ".txt if it holds text, or write it with numpy.save"
        )
    try:
        tokens = np.load(path, mmap_mode="r", allow_pickle=False)
    except OSError:
        raise
    except Exception as error:  # a damaged header raises whatever its parser raises
        reason = str(error).partition("\n")[0] or type(error).__name__
        if "Python objects" in reason or "pickle" in reason:
            reason = "it holds Python objects, not numbers"
        raise ConfigError(
            f"{path} is not an array file that NumPy can map: {reason}; write it again with "
            "numpy.save from an array of integers"
        ) from None
    if not isinstance(tokens, np.ndarray) or tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        array = isinstance(tokens, np.ndarray)
        found = f"{tokens.dtype} {list(tokens.shape)}" if array else "an archive"
        raise ConfigError(f"{path} holds {found}; token ids are integers [N], such as uint16")
    return tokens


def _open_bin(path: Path) -> np.ndarray:
    num_bytes = path.stat().st_size
    if num_bytes == 0:
        return np.empty(0, np.uint16)
    words = np.fromfile(path, "<i4", count=min(3, num_bytes // 4)).tolist()
    magic, version, length = [*words, 0, 0, 0][:3]
    if magic in LLMC_FORMATS or (magic in DATES and 0 <= version < OTHER_VERSIONS):
        return _open_llmc(path, num_bytes, magic, version, length)
    if num_bytes % 2:
        raise ConfigError(
            f"{path} has {num_bytes} bytes, an odd number; a .bin file holds uint16 token ids, two "
            "bytes each"
        )
    tokens = np.memmap(path, np.dtype("<u2"), mode="r")
    if (bits := _wider(tokens)) is not None:
        raise ConfigError(
            f"{path} seems to hold ids of {bits} bits: the upper halves of its words are all "
            f"{WIDE_HIGH} or less; a .bin file without a header holds uint16. Convert it with: "
            f"python -c \"import numpy; numpy.save('{path.with_suffix('.npy').name}', "
            f"numpy.fromfile('{path.name}', '<i{bits // 8}'))\""
        )
    return tokens


def _open_llmc(path: Path, num_bytes: int, magic: int, version: int, length: int) -> np.ndarray:
    """Map the ids behind a header of llm.c.

    Raises ConfigError for a header of another kind, or one that contradicts the file's length.
    """
    known = ", ".join(f"{m} version {v}" for m, (v, _) in LLMC_FORMATS.items())
    expected, kind = LLMC_FORMATS.get(magic, (None, "<u2"))
    if version != expected:
        raise ConfigError(
            f"{path} begins with a header of llm.c: magic number {magic}, version {version}, which "
            f"is not known here ({known} are); write it as one of these, or as a .npy file of its "
            "ids"
        )
    dtype = np.dtype(kind)
    count = (num_bytes - HEADER_BYTES) // dtype.itemsize
    if num_bytes < HEADER_BYTES or length != count:
        raise ConfigError(
            f"{path} says it holds {length} tokens, but its {num_bytes} bytes hold "
            f"{max(0, count)}; it was cut short or altered"
        )
    if not count:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r", offset=HEADER_BYTES, shape=(count,))


def _wider(tokens: np.ndarray) -> int | None:
    """Return 32 or 64 if uint16 `tokens` are the halves or quarters of wider ids, else None.

    Ids below 2^20 have upper halves of 15 or less. Genuine uint16 ids of a vocabulary above 16 have
    larger values at odd positions as well.
    """
    for parts in (4, 2):
        if len(tokens) % parts == 0 and len(tokens) >= 16 * parts:
            block = np.asarray(tokens[: WIDE_SAMPLE - WIDE_SAMPLE % parts]).reshape(-1, parts)
            upper, zero = block[:, 1], block[:, 2:]
            if upper.max() <= WIDE_HIGH < block[:, 0].max() and not zero.any():
                return 16 * parts
    return None
