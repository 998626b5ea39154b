"""Text files that are written whole or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from minillm.base.errors import ConfigError


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file by a temporary one beside it, which takes its name when it is complete.

    Line ends stay as they are. The folder must exist. Raises OSError, and then leaves what was
    there.
    """
    temporary = path.with_name(f".tmp-{path.name}-{secrets.token_hex(4)}")
    try:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_asked(path: Path, text: str, name: str) -> None:
    """Write the file that the flag `name` asks for. Raises ConfigError if it cannot be written."""
    if not path.name:
        raise ConfigError(f"{name} {path} cannot be written: it is no file name")
    try:
        write_text(path, text)
    except OSError as error:
        raise ConfigError(f"{name} {path} cannot be written: {error.strerror}") from None
