"""Ends of texts and templates of chats in foreign files, as vocabularies of checkpoints keep them.

A vocabulary has "ends", the ids that end a text, and "chat": the template with the names of the
tokens that begin and end a text. It has neither where the files do not say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from minillm.base.errors import CheckpointError

SETTINGS, GENERATION, TEMPLATE = (
    "tokenizer_config.json",
    "generation_config.json",
    "chat_template.jinja",
)
BORDERS = ("bos_token", "eos_token")  # as templates call them


def of_folder(
    path: Path, config: Mapping[str, Any], read: Callable[[Path], Mapping[str, Any]]
) -> dict[str, Any]:
    """Return what a folder of transformers says, whose JSON files `read` reads.

    Raises CheckpointError for a file that cannot be read.
    """
    settings, generation = (
        read(path / name) if (path / name).exists() else {} for name in (SETTINGS, GENERATION)
    )
    ends = generation.get("eos_token_id", config.get("eos_token_id"))
    template: Any = settings.get("chat_template")
    if (path / TEMPLATE).exists():
        try:
            template = (path / TEMPLATE).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{path / TEMPLATE} cannot be read: {error}") from None
    if isinstance(template, list):  # of named ones
        named = [each for each in template if isinstance(each, Mapping)]
        template = next((x.get("template") for x in named if x.get("name") == "default"), None)
    borders = {name: settings.get(name) for name in BORDERS}
    texts = {
        name: token.get("content") if isinstance(token, Mapping) else token
        for name, token in borders.items()
    }
    return _found(ends, template, texts)


def of_gguf(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a GGUF file say."""
    prefix, tokens = "tokenizer.ggml", metadata.get("tokenizer.ggml.tokens")
    tokens = tokens if isinstance(tokens, list) else []
    numbers = {
        name: metadata.get(f"{prefix}.{name}_id") for name in (*BORDERS, "eot_token", "eom_token")
    }
    ends = [number for name, number in numbers.items() if name != "bos_token"]
    texts = {
        name: tokens[number]
        for name in BORDERS
        if isinstance(number := numbers[name], int) and 0 <= number < len(tokens)
    }
    return _found(ends, metadata.get("tokenizer.chat_template"), texts)


def to_folder(vocabulary: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return what config.json and tokenizer_config.json say about a vocabulary."""
    ends, chat = vocabulary.get("ends"), dict(vocabulary.get("chat") or {})
    if "template" in chat:
        chat["chat_template"] = chat.pop("template")
    return {"eos_token_id": ends[0] if len(ends) == 1 else ends} if ends else {}, chat


def to_gguf(vocabulary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the metadata of a GGUF file say about a vocabulary; it has three ends at most."""
    names = (f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom"))
    found: dict[str, Any] = dict(zip(names, vocabulary.get("ends") or (), strict=False))
    if chat := vocabulary.get("chat"):
        found["tokenizer.chat_template"] = chat["template"]
    return found


def _found(ends: Any, template: Any, borders: Mapping[str, Any]) -> dict[str, Any]:
    numbers = ends if isinstance(ends, list) else [ends]
    known = [number for number in numbers if type(number) is int and number >= 0]
    found: dict[str, Any] = {"ends": known} if known else {}
    if isinstance(template, str) and template:
        texts = {name: text for name, text in borders.items() if isinstance(text, str)}
        found["chat"] = {"template": template, **texts}
    return found
