"""Metrics of a run as JSON lines: written by rank 0, and cut when a run goes back to a step."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from minillm.base.errors import MinillmError
from minillm.base.whole_file import replace, sync

METRICS = "metrics.jsonl"
SERVER_LOG = "server-{}.jsonl"  # of a parameter server, by its number
LEFT = "left-"  # before the name of a file of lines that a run has gone back behind


class MetricsFile:
    """Metrics file: one JSON line a step, on rank 0; a no-op if `path` is None.

    A file that is removed or replaced during the run is begun again, and `say` gets a line.
    """

    def __init__(self, path: Path | None, say: Callable[[str], None] = print) -> None:
        self._path, self._say = path, say
        self._file: BinaryIO | None = None
        if path is not None:
            with _naming(path):
                self._file = open_regular(path, "ab")

    def write(self, **values: Any) -> None:
        """Append one line. Raises MinillmError if the disk is full."""
        if self._file is None or self._path is None:
            return
        with _naming(self._path):
            if self._is_gone():
                self._file.close()
                self._file = open_regular(self._path, "ab")
                self._say(f"{self._path} was removed or replaced; it goes on in a new file")
            self._file.write(json.dumps(values).encode() + b"\n")
            self._file.flush()

    def sync(self) -> None:
        """Wait until all lines are on the disk. Raises MinillmError if it is full."""
        if self._file is not None and self._path is not None:
            with _naming(self._path):
                os.fsync(self._file.fileno())

    def _is_gone(self) -> bool:
        """Return whether the path names another file than the open one, or none."""
        assert self._file is not None and self._path is not None
        try:
            return not os.path.samestat(os.stat(self._path), os.fstat(self._file.fileno()))
        except FileNotFoundError:
            return True

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into a MinillmError with the path and a way out."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        way = "free some space and --resume" if full else "--resume when that is repaired"
        raise MinillmError(f"{path} cannot be written: {error.strerror}; {way}") from None


def open_regular(path: Path, mode: str) -> BinaryIO:
    """Open a regular file, or make it. Raises MinillmError for a pipe, a device or a folder."""
    try:
        kind = os.stat(path).st_mode
    except FileNotFoundError:
        kind = stat.S_IFREG
    if not stat.S_ISREG(kind):
        raise MinillmError(f"{path} is not a regular file; move it away and start again")
    return open(path, mode)  # type: ignore[return-value]


def logs_of(run: Path) -> list[str]:
    """Return the names of the files of lines by steps in the folder of a run, metrics first.

    There need not be one of metrics.
    """
    return [METRICS, *sorted(path.name for path in run.glob(SERVER_LOG.format("*")))]


def steps_of(path: Path) -> Iterator[tuple[int, bytes]]:
    """Yield (step, line) of a metrics file; nothing if there is none.

    Skips what is no JSON object with a step: a line that a crash cut off, a line of another
    program. Raises MinillmError for a pipe, a device or a folder.
    """
    if not os.path.lexists(path):
        return
    with open_regular(path, "rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
            except (ValueError, KeyError, TypeError, RecursionError, IndexError):
                continue
            if type(step) is int:
                yield step, line.rstrip(b"\n") + b"\n"


def keep_until(step: int, source: Path, target: Path) -> None:
    """Write the lines of `source` up to `step` to `target`, which may be the same file.

    Replaces `target` at once where files can be renamed. Raises OSError, and MinillmError for a
    pipe, a device or a folder.
    """
    temporary = target.with_name(target.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.writelines(line for number, line in steps_of(source) if number <= step)
            sync(file)
        replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def copy_later(step: int, source: Path, left: Path) -> int:
    """Append the lines of `source` after `step` to `left` and return their number.

    Raises OSError, and MinillmError for a pipe, a device or a folder.
    """
    later = [line for number, line in steps_of(source) if number > step]
    if later:
        with open_regular(left, "ab") as file:
            file.writelines(later)
            sync(file)
    return len(later)
