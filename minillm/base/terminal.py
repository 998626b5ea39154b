"""Standard streams: text that a terminal shows safely, and printing that never fails."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, TextIO

# C0 controls but tab and line feed, DEL, and C1 controls: a terminal obeys them.
_CONTROLS = {
    code: f"\\x{code:02x}" for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"
}


def printable(text: str) -> str:
    """Return `text` with control characters escaped: ESC becomes the four characters \\x1b.

    Tabs and line feeds stay.
    """
    return text.translate(_CONTROLS)


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


def drop_output() -> None:
    """Send the rest of standard output nowhere, after its reader has gone.

    The interpreter flushes the stream when it ends, and would report the broken pipe again.
    """
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


class GuardedStream:
    """Text stream that outlives its reader: once a write fails, the rest is dropped.

    `lost` is called with the reason, once.
    """

    def __init__(self, stream: TextIO, lost: Callable[[str], None]) -> None:
        self._stream, self._lost, self._gone = stream, lost, False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write and return the number of characters."""
        return self._try(self._stream.write, text) or len(text)

    def flush(self) -> None:
        """Flush."""
        self._try(self._stream.flush)

    def _try(self, fn: Callable[..., Any], *args: str) -> Any:
        if self._gone:
            return None
        try:
            return fn(*args)
        except OSError as error:
            self._gone = True
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                # The interpreter flushes the stream when it ends, and would fail again.
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._lost(f"standard output is lost ({error.strerror})")
            return None


@contextlib.contextmanager
def guarded_output(lost: Callable[[str], None]) -> Iterator[None]:
    """Call `lost` with the reason when standard output can no longer be written, as behind `head`.

    Inside the block no print fails.
    """
    before = sys.stdout
    sys.stdout = GuardedStream(before, lost)
    try:
        yield
    finally:
        sys.stdout = before
