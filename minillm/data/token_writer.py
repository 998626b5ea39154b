"""Writer of token files in the forms that `open_tokens` maps, with the places of the tokens."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.whole_file import replace
from minillm.data.token_files import HEADER_BYTES, LLMC_FORMATS
from minillm.tokenizers.pieces import token_dtype

NPY_HEADER = 128  # bytes; numpy pads headers with blanks to a multiple of 64


class TokenFileWriter:
    """Token file that is being written under a temporary name, block by block.

    Ids below 2^16 are uint16 without a header, as nanoGPT writes them; others are uint32 behind a
    header of llm.c. With `places`, a .npy file beside it holds the start and the end of each token
    in characters of the text, int64 [N, 2].
    """

    def __init__(self, path: Path, vocab_size: int, places: bool) -> None:
        """Raise ConfigError if `path` exists, is no .bin file, or its folder cannot be written."""
        if path.suffix != ".bin":
            raise ConfigError(f"--output {path} must end in .bin, as token files do")
        self.path, self.places_path = path, path.with_suffix(".offsets.npy")
        self._wide = token_dtype(vocab_size).itemsize > 2
        self._dtype = np.dtype("<u4" if self._wide else "<u2")
        self.number = 0
        targets = [path, self.places_path][: 1 + places]
        if taken := next((target for target in targets if target.exists()), None):
            raise ConfigError(f"--output {taken} exists; name a new one, or remove it")
        self._temporary = [target.with_name(f".tmp-{target.name}") for target in targets]
        self._files: list[Any] = []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._files = [open(name, "wb") for name in self._temporary]  # noqa: SIM115
            self._files[0].write(self._header())
            if places:
                self._files[1].write(self._npy_header())
        except OSError as error:
            self.discard()
            raise self._failed(error) from None

    def add(self, ids: np.ndarray, places: np.ndarray | None) -> None:
        """Append ids [n], and their places [n, 2]. Raises ConfigError if the disk is full."""
        try:
            self._files[0].write(ids.astype(self._dtype).data)
            if places is not None:
                self._files[1].write(np.ascontiguousarray(places, "<i8").data)
        except OSError as error:
            raise self._failed(error) from None
        self.number += len(ids)

    def finish(self) -> None:
        """Write the headers and give the files their names."""
        try:
            headers = (self._header(), self._npy_header())
            for file, header in zip(self._files, headers, strict=False):
                file.seek(0)
                file.write(header)
                file.close()
            targets = (self.path, self.places_path)
            for temporary, target in zip(self._temporary, targets, strict=False):
                replace(temporary, target)
        except OSError as error:
            raise self._failed(error) from None

    def discard(self) -> None:
        """Remove what was written under temporary names."""
        for file in self._files:
            with contextlib.suppress(OSError):
                file.close()
        for name in self._temporary:
            with contextlib.suppress(OSError):
                name.unlink()

    def _header(self) -> bytes:
        if not self._wide:
            return b""
        magic, version = next((m, v) for m, (v, kind) in LLMC_FORMATS.items() if kind == "<u4")
        words = np.zeros(HEADER_BYTES // 4, "<i4")
        words[:3] = magic, version, min(self.number, np.iinfo(np.int32).max)
        return words.tobytes()

    def _npy_header(self) -> bytes:
        shape = f"{{'descr': '<i8', 'fortran_order': False, 'shape': ({self.number}, 2), }}"
        size = NPY_HEADER - 10  # behind the magic string, the version and the size itself
        return b"\x93NUMPY\x01\x00" + size.to_bytes(2, "little") + f"{shape:<{size - 1}}\n".encode()

    def _failed(self, error: OSError) -> ConfigError:
        return ConfigError(
            f"--output {self.path} cannot be written: {error.strerror}; free some space, or name "
            "another file"
        )
