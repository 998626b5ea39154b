"""Reading a checkpoint's tensors: only the bytes asked for, however the files are cut."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from minillm.checkpoint.find import with_older
from minillm.checkpoint.manifest import Bounds, Damaged, TensorEntry, read_manifest
from minillm.layout.sharding import Slices, slice_shape


class CheckpointSource:
    """The tensors of the checkpoint folder `path`, as a `StateSource`. Files are opened when first
    needed, and mapped instead of read whole.

    Raises CheckpointError if the manifest is damaged, here, or a file is, on reading from it.
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
        """See `StateSource`."""
        return list(self.manifest.tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """See `StateSource`. Raises CheckpointError for an unknown name."""
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        """See `StateSource`. Raises CheckpointError for an unknown name."""
        return self._entry(name).dtype

    def read(self, name: str, global_slices: Slices) -> np.ndarray:
        """See `StateSource`: a new array put together from all pieces that overlap the block."""
        entry = self._entry(name)
        out = np.empty(slice_shape(global_slices), np.dtype(entry.dtype))
        filled = 0
        for piece in entry.pieces:
            common = tuple(
                (max(part.start, lo), min(part.stop, hi))
                for part, (lo, hi) in zip(global_slices, piece.bounds, strict=True)
            )
            if all(lo < hi for lo, hi in common):
                target = tuple(
                    slice(lo - part.start, hi - part.start)
                    for (lo, hi), part in zip(common, global_slices, strict=True)
                )
                out[target] = self._read_piece(
                    piece.file, piece.key, piece.bounds, common, out.dtype
                )
                filled += math.prod(hi - lo for lo, hi in common)
        if filled != out.size:
            raise with_older(
                self.path,
                Damaged(
                    f"{self.path} holds {filled} of the {out.size} elements asked for of {name}"
                ),
            )
        return out

    def _read_piece(
        self, file: str, key: str, bounds: Bounds, common: Bounds, dtype: np.dtype
    ) -> np.ndarray:
        """The part `common` (in global indices) of the piece at `bounds`."""
        from safetensors import SafetensorError

        try:
            if not bounds:  # a scalar
                block = self._open(file).get_tensor(key)
            else:
                view = self._open(file).get_slice(key)
                if tuple(view.get_shape()) != tuple(hi - lo for lo, hi in bounds):
                    raise ValueError(
                        f"{key} has shape {tuple(view.get_shape())}, which is not what the "
                        "manifest says"
                    )
                block = view[
                    tuple(
                        slice(lo - first, hi - first)
                        for (lo, hi), (first, _) in zip(common, bounds, strict=True)
                    )
                ]
        except (SafetensorError, OSError, ValueError) as error:
            raise with_older(
                self.path, Damaged(f"{self.path / file} cannot be read: {error}")
            ) from None
        if block.dtype != dtype:
            raise with_older(
                self.path,
                Damaged(
                    f"{self.path / file} holds {key} as {block.dtype}, but the manifest says "
                    f"{dtype}"
                ),
            )
        return block

    def _open(self, file: str) -> Any:
        from safetensors import safe_open

        if file not in self._files:
            self._files[file] = safe_open(self.path / file, framework="numpy")
        return self._files[file]

    def _entry(self, name: str) -> TensorEntry:
        if name not in self.manifest.tensors:
            raise Damaged(f"{self.path} holds no tensor called {name}")
        return self.manifest.tensors[name]
