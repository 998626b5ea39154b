"""The manifest of a checkpoint: which tensors there are, and in which file every piece of them
lies.

`manifest.json` is written last, so a folder that has one was written to the end. It carries a
checksum of itself beside those of the files.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minillm.base.errors import CheckpointError

MANIFEST = "manifest.json"
FORMAT = "minillm-checkpoint"
VERSION = 1

Bounds = tuple[tuple[int, int], ...]
"""The slices of a block as (start, stop) per dim: what JSON can hold and a dictionary can look
up."""


class Damaged(CheckpointError):
    """A file of a checkpoint is missing, truncated, altered or of another kind. The message starts
    with its path."""


@dataclass(frozen=True)
class Piece:
    """A block of a tensor: where it lies in the global array, the file it is in, and its key
    there."""

    bounds: Bounds
    file: str
    key: str

    @property
    def num_elements(self) -> int:
        """Elements of the block."""
        return math.prod(stop - start for start, stop in self.bounds)


@dataclass(frozen=True)
class TensorEntry:
    """A global tensor: its shape without padding, its dtype as NumPy spells it, and the pieces that
    cover it exactly once."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class FileEntry:
    """A file's size in bytes and the SHA-256 of its contents in hexadecimal."""

    size: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """A checkpoint's table of contents. `step` is the number of steps done; `meta` is whatever JSON
    value was given to `save`."""

    step: int
    meta: dict[str, Any]
    tensors: Mapping[str, TensorEntry]
    files: Mapping[str, FileEntry]

    def to_json(self) -> str:
        """The text of manifest.json."""
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
        files = {
            name: {"size": entry.size, "sha256": entry.sha256} for name, entry in self.files.items()
        }
        body = {
            "format": FORMAT,
            "version": VERSION,
            "step": self.step,
            "meta": self.meta,
            "files": files,
            "tensors": tensors,
        }
        body = json.loads(
            json.dumps(body)
        )  # so that what is hashed is what will be read: names as strings, tuples as lists
        return json.dumps(body | {"sha256": _digest(body)}, indent=1) + "\n"


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint folder `path`.

    Raises CheckpointError naming the file if it is missing, truncated, altered, of another kind, or
    of a later version.
    """
    file = Path(path) / MANIFEST
    try:
        body = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise Damaged(f"{file} is missing, so the checkpoint was never completed") from None
    except OSError as error:
        raise Damaged(f"{file} cannot be read: {error.strerror}") from None
    except ValueError as error:  # JSON and UTF-8 errors
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


def check_coverage(tensors: Mapping[str, TensorEntry]) -> None:
    """Raises ValueError unless the pieces of every tensor lie inside it, do not overlap, and leave
    nothing out."""
    for name, entry in tensors.items():
        if not all(_lies_inside(piece.bounds, entry.shape) for piece in entry.pieces):
            raise ValueError(f"a piece of {name} does not lie inside shape {entry.shape}")
        covered = sum(piece.num_elements for piece in entry.pieces)
        if covered != math.prod(entry.shape):
            raise ValueError(
                f"the pieces of {name} have {covered} elements, but shape {entry.shape} has "
                f"{math.prod(entry.shape)}"
            )
        if len({piece.bounds for piece in entry.pieces}) != len(entry.pieces):
            raise ValueError(f"{name} holds a piece twice")


def _lies_inside(bounds: Bounds, shape: tuple[int, ...]) -> bool:
    return len(bounds) == len(shape) and all(
        0 <= start <= stop <= size for (start, stop), size in zip(bounds, shape, strict=True)
    )


def _parse(body: dict[str, Any]) -> Manifest:
    tensors = {
        name: TensorEntry(
            tuple(int(size) for size in entry["shape"]),
            str(entry["dtype"]),
            tuple(
                Piece(
                    tuple((int(lo), int(hi)) for lo, hi in p["slices"]),
                    str(p["file"]),
                    str(p["key"]),
                )
                for p in entry["pieces"]
            ),
        )
        for name, entry in body["tensors"].items()
    }
    files = {
        name: FileEntry(int(entry["size"]), str(entry["sha256"]))
        for name, entry in body["files"].items()
    }
    for name in files:
        if Path(name).name != name:
            raise ValueError(f"file name {name!r} leads out of the folder")
    for name, entry in tensors.items():
        for piece in entry.pieces:
            if piece.file not in files:
                raise ValueError(f"{name} lies in {piece.file!r}, which is not listed")
    check_coverage(tensors)
    if not isinstance(body["meta"], dict):
        raise ValueError("meta is not an object")
    return Manifest(int(body["step"]), body["meta"], tensors, files)


def _digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of the contents, independent of how the text is laid out."""
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
