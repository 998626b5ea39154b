"""Manifest of a checkpoint: its tensors, and the file and key of each of their pieces.

Invariant: `manifest.json` is written last, so a folder is a checkpoint if and only if it has one
that was written to its end. It holds a checksum of itself and of every file.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.base.errors import CheckpointError
from minillm.base.whole_file import write_bytes

MANIFEST = "manifest.json"
FORMAT = "minillm-checkpoint"
VERSION = 1
START, END = b'{\n"format"', b"}\n"  # first and last bytes of a manifest
MOST_BYTES = 1 << 28  # of a manifest: 1 KB per tensor and rank, for GPT-3 on 1000 ranks

Bounds = tuple[tuple[int, int], ...]
"""Slices of a block as (start, stop) per dim: hashable, and a JSON value."""


class Damaged(CheckpointError):
    """Missing, truncated, altered or foreign file of a checkpoint. Its path begins the message."""


@dataclass(frozen=True)
class Piece:
    """Block of a global tensor, stored under one key of one file."""

    bounds: Bounds  # in the global array
    file: str
    key: str

    @property
    def num_elements(self) -> int:
        """Number of elements."""
        return math.prod(stop - start for start, stop in self.bounds)


@dataclass(frozen=True)
class TensorEntry:
    """Global tensor."""

    shape: tuple[int, ...]  # without padding
    dtype: str  # NumPy's name
    pieces: tuple[Piece, ...]  # cover the tensor exactly once


@dataclass(frozen=True)
class FileEntry:
    """File of a checkpoint."""

    size: int  # bytes
    sha256: str  # of the contents, hexadecimal


@dataclass(frozen=True)
class Manifest:
    """Table of contents of a checkpoint."""

    step: int  # completed steps
    meta: dict[str, Any]  # JSON value given to `save`
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]

    def to_json(self) -> str:
        """Return the text of manifest.json."""
        tensors = {
            name: {
                "shape": list(entry.shape),
                "dtype": entry.dtype,
                "pieces": [
                    {"slices": [list(bound) for bound in p.bounds], "file": p.file, "key": p.key}
                    for p in entry.pieces
                ],
            }
            for name, entry in self.tensors.items()
        }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "meta": self.meta,
            "files": {name: vars(entry) for name, entry in self.files.items()},
            "tensors": tensors,
        }
        body = json.loads(json.dumps(body))  # hash what will be read: tuples become lists
        body["sha256"] = _digest(body)
        # A line per entry. `indent` would choose Python's encoder, whose closures are a cycle.
        entries = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in body.items())
        return "{\n" + ",\n".join(entries) + "\n" + END.decode()


def is_complete(path: Path) -> bool:
    """Return whether a folder has a manifest that was written to its end.

    Reads little more than the last bytes. `read_manifest` finds out whether it was altered since,
    and refuses what is no manifest at all.
    """
    try:
        with open(path / MANIFEST, "rb", opener=_open_at_once) as stream:
            found = os.fstat(stream.fileno())
            if not stat.S_ISREG(found.st_mode) or found.st_size > MOST_BYTES:
                return True
            stream.seek(max(0, found.st_size - len(END)))
            last = stream.read()
            if last == END or not last.endswith(b"}"):
                return last == END
            stream.seek(0)
            json.load(stream)  # of another writer: cut off behind an inner bracket, or whole
            return True
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return False
    except OSError:
        return True


def is_unfinished(path: Path) -> bool:
    """Return whether a folder has no manifest, or the beginning of one alone."""
    try:
        with open(path / MANIFEST, "rb", opener=_open_at_once) as stream:
            return START.startswith(stream.read(len(START))) and not is_complete(path)
    except FileNotFoundError:
        return True
    except OSError:
        return False


def read_manifest(path: Path) -> Manifest:
    """Read the manifest of the checkpoint folder `path`.

    Raises Damaged if it is missing, truncated, altered, of another kind, or of a later version.
    """
    file = Path(path) / MANIFEST
    try:
        body = json.loads(_read(file))
        # Lone surrogates cannot be printed, except those that stand for bytes of a file name.
        json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogateescape")
    except FileNotFoundError:
        raise Damaged(f"{file} is missing, so the checkpoint was never completed") from None
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # JSON and UTF-8 errors, deep brackets
        raise Damaged(f"{file} is truncated or altered: {error}") from None
    if not isinstance(body, dict) or body.get("format") != FORMAT:
        raise Damaged(
            f"{file} is not the manifest of a minillm checkpoint: its format is not {FORMAT!r}"
        )
    if body.get("version") != VERSION:
        raise Damaged(
            f"{file} has format version {body.get('version')!r}, but this minillm reads version "
            f"{VERSION}; use the one that wrote it"
        )
    if body.pop("sha256", None) != _digest(body):
        raise Damaged(f"{file} was altered: its checksum does not fit its contents")
    try:
        return _parse(body)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Damaged(f"{file} is malformed: {type(error).__name__}: {error}") from None


def _read(file: Path) -> str:
    """Return the text of a regular file of at most MOST_BYTES; raise OSError for any other."""
    with open(file, encoding="utf-8", opener=_open_at_once) as stream:
        found = os.fstat(stream.fileno())
        if not stat.S_ISREG(found.st_mode):
            raise OSError(0, "it is not a regular file")
        if found.st_size > MOST_BYTES:
            raise OSError(0, f"it has {found.st_size} bytes, more than any manifest")
        return stream.read()


def _open_at_once(path: str, flags: int) -> int:
    """Open a file, without waiting for the writer of a FIFO."""
    return os.open(path, flags | os.O_NONBLOCK)


def replace_meta(path: Path, meta: dict[str, Any]) -> None:
    """Replace the `meta` of the checkpoint folder `path`; its files stay.

    Atomic where files can be renamed. Raises Damaged for a manifest that cannot be read, OSError if
    it cannot be written.
    """
    manifest = dataclasses.replace(read_manifest(path), meta=meta)
    write_bytes(path / MANIFEST, manifest.to_json().encode(), synced=True)


def check_coverage(tensors: Mapping[str, TensorEntry]) -> None:
    """Raise ValueError unless the pieces of each tensor cover it and no two intersect."""
    for name, entry in tensors.items():
        if not all(_lies_inside(piece.bounds, entry.shape) for piece in entry.pieces):
            raise ValueError(f"a piece of {name} does not lie inside shape {entry.shape}")
        covered, size = sum(p.num_elements for p in entry.pieces), math.prod(entry.shape)
        if covered != size:
            raise ValueError(
                f"the pieces of {name} have {covered} elements, but shape {entry.shape} has {size}"
            )
        common = _intersection([piece.bounds for piece in entry.pieces])
        if common is not None:
            raise ValueError(f"two pieces of {name} overlap: {common[0]} and {common[1]}")


def _intersection(pieces: Sequence[Bounds]) -> tuple[Bounds, Bounds] | None:
    """Return two of `pieces` that share an element, None if all are disjoint.

    A sweep along the first dim: a piece is compared with those that reach beyond its start.
    """
    reaching: list[Bounds] = []
    for bounds in sorted(pieces):
        if bounds:
            reaching = [other for other in reaching if other[0][1] > bounds[0][0]]
        for other in reaching:
            pairs = zip(bounds, other, strict=True)
            if all(max(a[0], b[0]) < min(a[1], b[1]) for a, b in pairs):
                return other, bounds
        reaching.append(bounds)
    return None


def _lies_inside(bounds: Bounds, shape: tuple[int, ...]) -> bool:
    return len(bounds) == len(shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(bounds, shape, strict=True)
    )


def _parse(body: dict[str, Any]) -> Manifest:
    files = {
        name: FileEntry(_count(entry["size"]), str(entry["sha256"]))
        for name, entry in body["files"].items()
    }
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"file name {name!r} leads out of the folder")
    tensors = {}
    for name, entry in body["tensors"].items():
        pieces = []
        for p in entry["pieces"]:
            if p["file"] not in files:
                raise ValueError(f"{name} lies in {p['file']!r}, which is not listed")
            bounds = tuple((_count(lo), _count(hi)) for lo, hi in p["slices"])
            pieces.append(Piece(bounds, p["file"], str(p["key"])))
        shape = tuple(map(_count, entry["shape"]))
        tensors[name] = TensorEntry(shape, str(entry["dtype"]), tuple(pieces))
    check_coverage(tensors)
    if not isinstance(body["meta"], dict):
        raise ValueError("meta is not an object")
    return Manifest(_count(body["step"]), body["meta"], tensors, files)


def _count(value: Any) -> int:
    """Return `value` if it is a whole number in [0, 2^63)."""
    if type(value) is not int or not 0 <= value < 1 << 63:
        raise ValueError(f"{value!r} is no count")
    return value


def _digest(body: Mapping[str, Any]) -> str:
    """Return the SHA-256 of the contents, independent of white space and order of keys."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
