"""Standard streams: their terminals, text that is safe there, and printing that never fails."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

from minillm.base.errors import ConfigError

# Programs of MPICH and Open MPI between a terminal and the ranks.
_LAUNCHERS = {
    *("mpirun", "mpiexec", "mpiexec.hydra", "hydra_pmi_proxy"),
    *("orterun", "prterun", "prted"),
}

# C0 controls but tab and line feed, DEL, and C1 controls: a terminal obeys them.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def printable(text: str) -> str:
    """Return `text` with control characters escaped: ESC becomes the four characters \\x1b.

    Tabs and line feeds stay.
    """
    return text.translate(_CONTROLS)


def one_line(text: str) -> str:
    """Return `text` with control characters escaped, line feeds too: it may quote any value."""
    return printable(text).replace("\n", "\\n")


def utf8_input() -> None:
    """Read standard input as UTF-8, whatever the locale says."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8")


def open_streams() -> None:
    """Make printing safe: a closed stream drops its text, and no character is an error.

    A character that the encoding of the stream lacks is escaped, as é to \\xe9 in ASCII.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:  # closed by the shell (2>&-)
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 (lives as long as the process)
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def drop_output(stream: TextIO | None = None) -> None:
    """Send the rest of a stream nowhere, by default of standard output, after a write has failed.

    The interpreter flushes the stream when it ends, and would report the failure again.
    """
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), (stream or sys.stdout).fileno())


class GuardedStream:
    """Text stream that outlives its reader: once a write fails, the rest is dropped.

    `lost` is called with the error, once; it may raise.
    """

    def __init__(self, stream: TextIO, lost: Callable[[OSError], None]) -> None:
        self.stream, self._lost, self._gone = stream, lost, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write and return the number of characters."""
        return self._try(self.stream.write, text) or len(text)

    def flush(self) -> None:
        """Flush."""
        self._try(self.stream.flush)

    def _try(self, fn: Callable[..., Any], *args: str) -> Any:
        if self._gone:
            return None
        try:
            return fn(*args)
        except OSError as error:
            self._gone = True
            with contextlib.suppress(OSError, ValueError):
                drop_output(self.stream)
            self._lost(error)
            return None


@contextlib.contextmanager
def guarded_output(lost: Callable[[OSError], None]) -> Iterator[None]:
    """Call `lost` with the error when standard output can no longer be written, as behind `head`.

    Inside the block no print fails, unless `lost` raises. The block may stand inside another, whose
    `lost` then rests.
    """
    before = sys.stdout
    stream = before.stream if isinstance(before, GuardedStream) else before
    sys.stdout = guarded = GuardedStream(stream, lost)
    try:
        try:
            yield
        except SystemExit:  # after --help
            guarded.flush()
            raise
        guarded.flush()
    finally:
        sys.stdout = before


def refuse_output(error: OSError) -> None:
    """Raise BrokenPipeError for a reader that has gone, and ConfigError for any other `error`."""
    if isinstance(error, BrokenPipeError):
        raise error
    raise ConfigError(f"standard output cannot be written: {error.strerror}") from None


def printing(program: Callable[[], int]) -> int:
    """Return the exit status of a program that needs no MPI.

    It is 141 if the reader of its output has gone, and 1 with a line if the output is lost
    otherwise, as on a full disk.
    """
    try:
        with guarded_output(refuse_output):
            return program()
    except BrokenPipeError:
        return 141
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def can_print(text: str) -> bool:
    """Return True if standard output has these characters."""
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "ascii")
    except UnicodeEncodeError:
        return False
    return True


def terminals() -> tuple[TextIO | None, TextIO | None]:
    """Return the terminal for a live line, and that of the launcher for lines above it.

    The first is that of standard error, of this process or of its launcher: mpirun pipes the output
    of its ranks. None if there is none.
    """
    if sys.stderr is not None and sys.stderr.isatty():
        return sys.stderr, None
    with contextlib.suppress(OSError, ValueError, IndexError):
        launchers = list(_launchers())
        if launchers and _in_foreground(launchers[-1]):
            live, lines = (_opened(f"/proc/{launchers[-1]}/fd/{number}") for number in (2, 1))
            return live, lines
    return None, None


def _launchers(root: str = "/proc") -> Iterator[int]:
    """Yield the ancestors of this process that belong to the launcher, the nearest first."""
    pid = os.getppid()
    while pid > 1:
        name, parent = _process(pid, root)[:2]
        if name not in _LAUNCHERS:
            return
        yield pid
        pid = int(parent)


def _process(pid: int, root: str = "/proc") -> list[str]:
    """Return name, parent, group and foreground group of the terminal of a process (proc(5))."""
    with open(f"{root}/{pid}/stat", encoding="utf-8", errors="replace") as file:
        before, _, after = file.read().rpartition(")")
    words = after.split()
    return [before.partition("(")[2], words[1], words[2], words[5]]


def _in_foreground(pid: int) -> bool:
    _, _, group, foreground = _process(pid)
    return group == foreground


def _opened(path: str) -> TextIO | None:
    """Return the terminal at `path` for writing, None if it is no terminal.

    It does not become the terminal that controls this process.
    """
    if not os.readlink(path).startswith("/dev/"):
        return None
    descriptor = os.open(path, os.O_WRONLY | os.O_NOCTTY)
    if os.isatty(descriptor):
        encoding = getattr(sys.stderr, "encoding", None)
        return open(descriptor, "w", encoding=encoding, errors="replace")
    os.close(descriptor)
    return None
