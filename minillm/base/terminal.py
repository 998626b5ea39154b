"""Standard streams: text that a terminal shows safely, and printing that never fails."""

from __future__ import annotations

import os
import sys

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
