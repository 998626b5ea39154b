"""Error of a tokenizer that is valid, but beyond what minillm encodes by itself."""

from __future__ import annotations

from minillm.base.errors import ConfigError


class Unsupported(ConfigError):
    """Part of a tokenizer.json that takes the package `tokenizers`; the message names it."""


def require(condition: object, found: str) -> None:
    """Raise Unsupported that names what was found, unless `condition` holds."""
    if not condition:
        raise Unsupported(found)
