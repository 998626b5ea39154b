"""Stand-ins for file systems: without rename, full, or of a process that dies amid an operation."""

from __future__ import annotations

import builtins
import contextlib
import errno
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest


class Crash(BaseException):
    """Stands for the death of the process: from then on no operation changes anything."""


class FileSystem:
    """File system of this process inside `standing`: `renames` all, only files, or nothing.

    `error` is the number of the error of a rename that it does not have.
    """

    def __init__(self, renames: str = "all", error: int = errno.ENOSYS) -> None:
        self.renames, self.error = renames, error
        self.refused = 0
        """Renames that were refused."""
        self.done = 0
        """Operations that changed something."""
        self._last: int | None = None

    def change(self, operation: Callable[[], Any], half: Callable[[], Any] = lambda: None) -> Any:
        """Do an operation that changes something; die at the last one, after a `half` of it."""
        if self._last is not None and self.done >= self._last:
            if self.done == self._last:
                half()
            self.done += 1
            raise Crash
        self.done += 1
        return operation()

    @contextlib.contextmanager
    def standing(self, dying_at: int | None = None) -> Iterator[FileSystem]:
        """Stand in for the file system; the process dies at operation `dying_at`, from 0."""
        self.done, self._last = 0, dying_at
        usual = builtins.open

        def opened(file: Any, mode: str = "r", *args: Any, **options: Any) -> Any:
            if not set(mode) & set("wxa+") or isinstance(file, int):
                return usual(file, mode, *args, **options)
            return Stream(self, self.change(lambda: usual(file, mode, *args, **options)))

        with pytest.MonkeyPatch.context() as patch:
            for name in ("mkdir", "rmdir", "unlink", "truncate"):
                patch.setattr(os, name, self._changing(getattr(os, name)))
            for name in ("rename", "replace"):
                patch.setattr(os, name, self._renaming(getattr(os, name)))
            scan = os.scandir
            patch.setattr(os, "scandir", lambda *path: Entries(scan(*path)))
            patch.setattr(builtins, "open", opened)
            patch.setattr(io, "open", opened)
            yield self

    def _changing(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: self.change(lambda: usual(*args, **options))

    def _renaming(self, usual: Callable[..., Any]) -> Callable[..., Any]:
        def rename(source: Any, target: Any, **options: Any) -> None:
            if self.renames == "nothing" or (self.renames == "files" and os.path.isdir(source)):
                self.refused += 1
                raise OSError(self.error, os.strerror(self.error), str(source))
            self.change(lambda: usual(source, target, **options))

        return rename


class Entries(list[Any]):
    """Entries of a folder, listed backwards: the manifest behind the files of ranks."""

    def __init__(self, found: Any) -> None:
        with found:
            super().__init__(sorted(found, key=lambda entry: entry.name, reverse=True))

    def __enter__(self) -> Entries:
        return self

    def __exit__(self, *args: Any) -> None:
        """Do nothing: the entries are read."""

    def close(self) -> None:
        """Do nothing, likewise."""


class Stream:
    """Open file whose writes are operations of a `FileSystem`."""

    def __init__(self, system: FileSystem, file: Any) -> None:
        self._system, self._file = system, file

    def write(self, data: Any) -> int:
        """Write `data`, or half of it when the process dies."""
        return self._system.change(
            lambda: self._file.write(data), lambda: self._file.write(data[: len(data) // 2])
        )

    def writelines(self, lines: Any) -> None:
        """Write several lines."""
        for line in lines:
            self.write(line)

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *args: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


def names(directory: Path) -> list[str]:
    """Return the names of the entries of a folder."""
    return sorted(path.name for path in directory.iterdir())
