"""Settings of a tokenizer.json that serve other programs, and checks that all tokenizers share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from minillm.base.errors import ConfigError

MOST_IDS = 1 << 31  # ids are smaller: pairs of them are 64-bit keys
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


def check_ids(model: Mapping[str, Any], added: Sequence[Mapping[str, Any]]) -> None:
    """Raise ValueError unless a vocabulary and added tokens give texts ids of their own.

    An added token may have the id that the vocabulary gives to it.
    """
    vocab: dict[Any, Any] = model["vocab"]
    if not isinstance(vocab, dict):
        raise ValueError("its vocabulary is no JSON object")
    pairs = [*vocab.items(), *((token["content"], token["id"]) for token in added)]
    for token, number in pairs:
        if not isinstance(token, str) or type(number) is not int or not 0 <= number < MOST_IDS:
            raise ValueError(f"the token {token!r} has the id {number!r}")
    if len(set(vocab.values())) < len(vocab):
        names = dict(zip(vocab.values(), vocab, strict=True))
        twice = next(token for token, number in vocab.items() if names[number] != token)
        raise ValueError(f"the tokens {twice!r} and {names[vocab[twice]]!r} have one id")


def setting(table: Mapping[str, Any], name: str, default: Any) -> Any:
    """Return a value of the type of its default. Raises ValueError for one of another type."""
    value = table.get(name, default)
    if type(value) is not type(default):
        raise ValueError(f"{name} is {value!r}")
    return value


def vocabulary_size(name: str, ids: Mapping[str, int]) -> int:
    """Return the largest id plus one. Raises ConfigError if it is far above the number of ids."""
    size = max(ids.values(), default=-1) + 1
    if size > 2 * len(ids) + LARGEST_GAP:
        raise ConfigError(
            f"{name} has {len(ids)} tokens, but its largest id is {size - 1}; a model would hold a "
            "row for every id below it. Number its tokens from 0"
        )
    return size
