"""Cache of tokenized texts: a folder for each text and tokenizer, which later starts map.

An entry `DIR/tokens/KEY` holds `train.ids`, `held_out.ids`, `lengths` and `entry.json`. The key
hashes all that the ids depend on: the text, the tokenizer and the place of the cut. An entry is
written under another name and renamed, so that it is whole or absent, and two runs may write it at
the same time. Everything in the folder may be deleted at any time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from minillm.base.errors import ConfigError
from minillm.base.whole_file import replace, write_text
from minillm.data.token_files import fingerprint

VERSION = 1  # of the entries and of the rule by which texts are cut into pieces
ABANDONED = 24 * 3600  # seconds after which the unfinished entry of a killed run is removed
PARTS = ("train", "held_out", "lengths")  # names of the arrays of an entry


class Encoded(NamedTuple):
    """Token ids of a text."""

    train: np.ndarray  # [N] unsigned
    held_out: np.ndarray  # [M] unsigned
    lengths: np.ndarray  # [M]: bytes of the text that each held-out token stands for
    sha256: str  # of the ids, those to train on first, as little-endian bytes


def cache_folder(asked: str | None) -> Path:
    """Return the folder of --cache, by default $XDG_CACHE_HOME/minillm or ~/.cache/minillm."""
    if asked:
        return Path(asked).expanduser()
    base = os.environ.get("XDG_CACHE_HOME", "")
    return Path(base if os.path.isabs(base) else os.path.expanduser("~/.cache")) / "minillm"


def entry_key(**facts: Any) -> str:
    """Return the name of the entry for JSON values that determine its ids."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


class EntryWriter:
    """Entry that is being written, under a temporary name beside its own.

    `path` is that of the finished entry. Raises OSError if the folder cannot be written.
    """

    def __init__(self, path: Path, dtype: np.dtype) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path.parent)
        self.path = path
        self.temporary = Path(tempfile.mkdtemp(prefix=f".tmp-{path.name}-", dir=path.parent))
        self._dtypes = {"train": dtype, "held_out": dtype, "lengths": np.dtype("<u4")}
        self._files = {part: open(self.temporary / part, "wb") for part in PARTS}  # noqa: SIM115
        self._digest = hashlib.sha256()

    def add(self, ids: np.ndarray, lengths: np.ndarray | None) -> None:
        """Append the ids of a piece, held-out ones with their lengths.

        The ids to train on come first. Raises ConfigError if the disk is full.
        """
        self._digest.update(ids.data)
        with self._writing():
            self._files["train" if lengths is None else "held_out"].write(ids.data)
            if lengths is not None:
                self._files["lengths"].write(lengths.astype("<u4").data)

    def finish(self) -> None:
        """Give the entry its name. One that another run has finished meanwhile is kept."""
        with self._writing():
            for file in self._files.values():
                file.close()
            arrays = {part: _map(self.temporary / part, d) for part, d in self._dtypes.items()}
            facts = {
                "version": VERSION,
                "sha256": self._digest.hexdigest(),
                "dtypes": {part: array.dtype.str for part, array in arrays.items()},
                "sizes": {part: array.nbytes for part, array in arrays.items()},
                "fingerprints": {part: fingerprint(array) for part, array in arrays.items()},
            }
            del arrays
            (self.temporary / "entry.json").write_text(json.dumps(facts), encoding="utf-8")
            if read_entry(self.path) is None:
                shutil.rmtree(self.path, ignore_errors=True)
                with contextlib.suppress(OSError):  # another run was faster
                    replace(self.temporary, self.path)
        self.discard()

    def discard(self) -> None:
        """Remove what was written under the temporary name."""
        for file in self._files.values():
            with contextlib.suppress(OSError):
                file.close()
        shutil.rmtree(self.temporary, ignore_errors=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.discard()
            raise ConfigError(
                f"the tokens cannot be written to {self.temporary.parent}: {error.strerror}; free "
                "some space, or name another folder with --cache"
            ) from None


def read_entry(path: Path) -> Encoded | None:
    """Map the arrays of an entry; None if it is absent or damaged."""
    try:
        facts = json.loads((path / "entry.json").read_text(encoding="utf-8"))
        train, held_out, lengths = arrays = [
            _map(path / part, np.dtype(facts["dtypes"][part])) for part in PARTS
        ]
        whole = facts["version"] == VERSION and all(
            array.nbytes == facts["sizes"][part]
            and fingerprint(array) == facts["fingerprints"][part]
            for part, array in zip(PARTS, arrays, strict=True)
        )
        return Encoded(train, held_out, lengths, facts["sha256"]) if whole else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_json(path: Path) -> Any:
    """Return the JSON value of a file; None if it is absent or damaged."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def write_json(path: Path, value: Any) -> None:
    """Write a JSON value atomically. Raises OSError if the folder cannot be written."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(value))


def _map(path: Path, dtype: np.dtype) -> np.ndarray:
    if path.stat().st_size == 0:
        return np.empty(0, dtype)
    return np.memmap(path, dtype, mode="r")


def _remove_abandoned(folder: Path) -> None:
    """Remove what killed runs have left behind for a day."""
    for path in folder.glob(".tmp-*"):
        with contextlib.suppress(OSError):
            newest = max((child.stat().st_mtime for child in path.iterdir()), default=0)
            if time.time() - max(newest, path.stat().st_mtime) > ABANDONED:
                shutil.rmtree(path, ignore_errors=True)
