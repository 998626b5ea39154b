"""Checkpoint reader: any block of a global tensor, without reading whole files."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from minillm.checkpoint.find import with_older
from minillm.checkpoint.manifest import Bounds, Damaged, Piece, TensorEntry, read_manifest
from minillm.checkpoint.state import StateSource
from minillm.layout.sharding import Slices, overlap, slice_shape


class CheckpointSource:
    """Tensors of the checkpoint folder `path`. Implements `StateSource`.

    Files are opened lazily and memory-mapped. The constructor raises CheckpointError for a damaged
    manifest, `read` for a damaged file.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        try:
            self.manifest = read_manifest(self.path)
        except Damaged as error:
            raise with_older(self.path, error) from None
        self._files: dict[str, Any] = {}

    def __str__(self) -> str:
        return f"checkpoint {self.path}"

    def names(self) -> list[str]:
        """Return the names of all tensors."""
        return list(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of `name`. Raises CheckpointError for an unknown name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype. Raises CheckpointError for an unknown name."""
        return self._entry(name).dtype

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """Return a new array, assembled from all pieces that overlap `global_slices`."""
        entry = self._entry(name)
        out = np.empty(slice_shape(global_slices), np.dtype(entry.dtype))
        filled = 0
        for piece in entry.pieces:
            common = overlap_of(global_slices, piece.bounds)
            if common is not None:
                target = relative(common, [part.start for part in global_slices])
                out[target] = self._read_piece(piece, common, out.dtype)
                filled += math.prod(slice_shape(common))
        if filled != out.size:
            raise self._damaged(
                f"{self.path} holds {filled} of the {out.size} elements asked for of {name}"
            )
        return out

    def _read_piece(self, piece: Piece, common: Slices, dtype: np.dtype) -> np.ndarray:
        """Return the part `common` (in global indices) of a piece."""
        from safetensors import SafetensorError

        file, key, bounds = self.path / piece.file, piece.key, piece.bounds
        try:
            if not bounds:  # a scalar
                block = self._open(piece.file).get_tensor(key)
            else:
                view = self._open(piece.file).get_slice(key)
                shape = tuple(view.get_shape())
                if shape != tuple(hi - lo for lo, hi in bounds):
                    raise ValueError(f"{key} has shape {shape}, unlike in the manifest")
                block = view[relative(common, [first for first, _ in bounds])]
        except (SafetensorError, OSError, ValueError) as error:
            raise self._damaged(f"{file} cannot be read: {error}") from None
        if block.dtype != dtype:
            raise self._damaged(
                f"{file} holds {key} as {block.dtype}, but the manifest says {dtype}"
            )
        return block

    def _damaged(self, message: str) -> Damaged:
        return with_older(self.path, Damaged(message))

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="numpy")
        return self._files[file]

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise Damaged(f"{self.path} holds no tensor called {name}")
        return self.manifest.tensors[name]


class FirstRows:
    """Source in which the tensor `name`, if there is one, has at most its first `rows` rows.

    A model with a shorter context takes the head of a learned table of positions.
    """

    def __init__(self, source: StateSource, name: str, rows: int) -> None:
        self.source, self.name, self.rows = source, name, rows

    def __str__(self) -> str:
        return str(self.source)

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""
        return self.source.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the global shape of `name`."""
        shape = self.source.shape(name)
        return (min(shape[0], self.rows), *shape[1:]) if name == self.name else shape

    def dtype(self, name: str) -> str:
        """Return NumPy's name of the dtype."""
        return self.source.dtype(name)

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """Return a block of the global tensor."""
        return self.source.read(name, global_slices)


def overlap_of(global_slices: Slices, bounds: Bounds) -> Slices | None:
    """Return the part of a block that lies within `bounds`, in global indices; None if none does.

    Without dims, a scalar, it is the whole.
    """
    pairs = zip(global_slices, bounds, strict=True)
    common = tuple(overlap(part, slice(*each)) for part, each in pairs)
    return common if all(part.start < part.stop for part in common) else None


def relative(slices: Slices, starts: Iterable[int]) -> Slices:
    """Return `slices` with their indices counted from `starts`."""
    pairs = zip(slices, starts, strict=True)
    return tuple(slice(part.start - start, part.stop - start) for part, start in pairs)
