"""Text from standard input: prompts that are asked for, and what is piped in."""

from __future__ import annotations

import contextlib
import importlib
import os
import stat
import sys
from collections.abc import Callable

from minillm.base.errors import ConfigError
from minillm.comm.launchers import launched


def piped() -> bool:
    """Tell whether text is piped in. A launcher always gives the first rank a pipe."""
    if sys.stdin is None or launched() is not None:
        return False
    try:
        mode = os.fstat(sys.stdin.fileno()).st_mode
    except (OSError, ValueError):  # closed, or no file at all
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode)


def whole_input() -> str:
    """Return all of standard input. Raises ConfigError if it is closed, or not UTF-8."""
    return _read(lambda: sys.stdin.read())


def ask() -> str | None:
    """Ask for a line on standard input; return None at its end."""
    if sys.stdin is not None and sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # input() then edits lines and remembers them
        try:
            return input("> ")
        except EOFError:
            print()
            return None
    if launched() is not None:
        print("> ", end="", flush=True)
    line = _read(lambda: sys.stdin.readline())
    return line.removesuffix("\n") if line else None


def _read(read: Callable[[], str]) -> str:
    if sys.stdin is None:
        raise ConfigError("standard input is closed; give the text with --prompt")
    try:
        return read()
    except UnicodeDecodeError as error:
        raise ConfigError(f"standard input is not UTF-8 text: {error}") from None
