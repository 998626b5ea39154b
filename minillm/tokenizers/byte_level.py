"""Byte-level vocabularies: printable characters for bytes, and rules that cut a text into words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minillm.tokenizers.unicode import Pattern
from minillm.tokenizers.unsupported import require

# Radford et al. 2019
GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in byte-level vocabularies.

    Printable Latin-1 stands for itself, the rest for U+0100 and on (Radford et al. 2019).
    """
    own = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte if byte in own else next(others)) for byte in range(256)]


def pre_tokenizer(use_regex: bool = True) -> dict[str, Any]:
    """Return the part of a tokenizer.json that cuts a text as GPT-2 does, or not at all."""
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


def definition_of(model: dict[str, Any], cut: dict[str, Any]) -> dict[str, Any]:
    """Return the tokenizer.json of a byte-level model whose words `cut` makes."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [],
        "normalizer": None,
        "pre_tokenizer": cut,
        "post_processor": None,
        "decoder": pre_tokenizer(),
        "model": model,
    }


class Cutter:
    """Pre-tokenizer of a byte-level model: patterns one after another, each over the last's words.

    Raises Unsupported for kinds other than ByteLevel, alone or after Split and Digits.
    """

    def __init__(self, spec: Mapping[str, Any] | None) -> None:
        parts = _flat(spec)
        kinds = [part.get("type") for part in parts]
        require(kinds and kinds[-1] == "ByteLevel", f"the pre_tokenizer {_named(kinds)}")
        self.prefix = " " if parts[-1].get("add_prefix_space", True) else ""
        """Blank before a text that does not begin with one."""
        require(not self.prefix or len(parts) == 1, "add_prefix_space after another pre_tokenizer")
        self._patterns = [Pattern(found) for part in parts for found in _patterns(part)]

    def __call__(self, text: str) -> list[str]:
        """Return the words of `text`, which together are the text."""
        words = [text]
        for pattern in self._patterns:
            cut = pattern.cut
            words = cut(text) if len(words) == 1 else [new for word in words for new in cut(word)]
        return words


def _flat(spec: Mapping[str, Any] | None) -> list[Mapping[str, Any]]:
    """Return the pre-tokenizers of a sequence, or the one."""
    if spec is None:
        return []
    if spec.get("type") == "Sequence":
        return [part for inner in spec["pretokenizers"] for part in _flat(inner)]
    return [spec]


def _named(kinds: list[Any]) -> str:
    return ", ".join(map(str, kinds)) or "none"


def _patterns(part: Mapping[str, Any]) -> list[str]:
    """Return the pattern of one pre-tokenizer, in a list that is empty if it cuts nothing."""
    match part:
        case {"type": "ByteLevel"}:
            return [GPT2] if part.get("use_regex", True) else []
        case {"type": "Digits"}:
            return [r"\p{N}" if part.get("individual_digits") else r"\p{N}+"]
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated"}:
            require(not part.get("invert"), "a Split that is inverted")
            return [pattern]
    require(False, f"the pre_tokenizer {part.get('type')} {part.get('behavior', '')}".rstrip())
    return []
