"""Settings of a tokenizer.json that serve other programs, and checks that all tokenizers share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.base.errors import ConfigError

LARGEST_GAP = 1 << 16  # ids without a token that a tokenizer.json may have beyond half of all


def plain_settings(definition: Mapping[str, Any]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return a tokenizer.json without truncation, padding and dropout, and those it had.

    The first two change the number of tokens of a text, and dropout gives every rank other tokens.
    Raises ValueError for what is no JSON object with an object `model`.
    """
    if not isinstance(definition, dict) or not isinstance(definition.get("model"), dict):
        raise ValueError("no JSON object with a model")
    value = {**definition, "model": {**definition["model"]}}
    found = []
    for table, name in (
        (value, "truncation"),
        (value, "padding"),
        (value["model"], "dropout"),
    ):
        if table.get(name):
            table[name] = None
            found.append(name)
    return value, tuple(found)


def vocabulary_size(name: str, ids: Mapping[str, int]) -> int:
    """Return the largest id plus one. Raises ConfigError if it is far above the number of ids."""
    size = max(ids.values(), default=-1) + 1
    if size > 2 * len(ids) + LARGEST_GAP:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, but its largest id is {size - 1}; a model would hold a "
            "row for every id below it. Number its tokens from 0"
        )
    return size
