"""Unicode properties in regular expressions: patterns of tokenizers for Python's `re`.

Python's `re` has no `\\p{L}`. A pattern is rewritten with the ranges of code points instead, from
the tables of `unicodedata`. Other programs may have the tables of another Unicode version.
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections.abc import Iterable

from minillm.tokenizers.unsupported import Unsupported

VERSION = unicodedata.unidata_version

Ranges = list[tuple[int, int]]  # first and last code point, ascending

LAST = 0x10FFFF
ASSIGNED = ((0, 0x3FFFF), (0xE0000, 0xE0FFF))  # beyond: private use, or nothing
WHITE_SPACE: Ranges = [
    *((0x09, 0x0D), (0x20, 0x20), (0x85, 0x85), (0xA0, 0xA0), (0x1680, 0x1680), (0x2000, 0x200A)),
    *((0x2028, 0x2029), (0x202F, 0x202F), (0x205F, 0x205F), (0x3000, 0x3000)),
]
"""The property White_Space. `re` adds U+001C to U+001F to it."""

LEVELS = (0x7F, 0xFFFF, LAST)
"""Largest code points of the variants of a pattern: `re` looks up those below 2^16 in a bitmap, and
searches the ranges beyond one by one."""

_PART = re.compile(r"\\([pP])\{(\^?)(\w+)\}|\\(.)|(&&)|([\s\S])", re.DOTALL)


@functools.cache
def categories() -> dict[str, Ranges]:
    """Return the ranges of each general category, such as Lu, among `ASSIGNED`."""
    found: dict[str, Ranges] = {}
    for first, last in ASSIGNED:
        points = range(first, last + 1)
        for name, run in itertools.groupby(points, lambda point: unicodedata.category(chr(point))):
            inside = list(run)
            found.setdefault(name, []).append((inside[0], inside[-1]))
    return found


@functools.cache
def ranges_of(name: str) -> Ranges:
    """Return the ranges of a category, such as Lu, or of all that begin with a letter, such as L.

    Raises Unsupported for other names.
    """
    if name == "s":
        return WHITE_SPACE
    found = [r for category, runs in categories().items() for r in runs if category[:1] == name]
    found = found or categories().get(name, [])
    if not found or name[:1] == "C":
        raise Unsupported(f"\\p{{{name}}} in a pattern")
    return sorted(found)


def complement(ranges: Ranges) -> Ranges:
    """Return the ranges of all other code points."""
    edges = [-1, *(edge for pair in ranges for edge in pair), LAST + 1]
    gaps = zip(edges[::2], edges[1::2], strict=True)
    return [(before + 1, after - 1) for before, after in gaps if after - before > 1]


def in_brackets(ranges: Iterable[tuple[int, int]], largest: int = LAST) -> str:
    """Return the ranges up to `largest` as the inside of a character class of `re`."""
    kept = ((first, min(last, largest)) for first, last in ranges if first <= largest)
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in kept)


def rewritten(pattern: str, largest: int) -> str:
    """Return a pattern of Oniguruma as one of `re`, for texts without code points above `largest`.

    Groups do not capture. Raises Unsupported for what `re` has not, or means otherwise.
    """
    parts: list[str] = []
    inside = False  # a character class
    for match in _PART.finditer(pattern):
        kind, negated, name, escaped, intersection, character = match.groups()
        if kind or (escaped and escaped in "sSdD"):
            ranges = ranges_of(name or {"d": "Nd"}.get(escaped.lower(), "s"))
            if (kind == "P") != bool(negated) or (escaped or "").isupper():
                ranges = complement(ranges)
            text = in_brackets(ranges, largest)
            parts.append(text if inside else f"[{text}]" if text else "(?!)")
        elif escaped:
            if escaped.isalnum() and escaped not in "rnt":
                raise Unsupported(f"\\{escaped} in a pattern")
            parts.append(match[0])
        elif intersection or (inside and character == "["):
            raise Unsupported(f"{match[0]} in a character class")
        elif not inside and (character in "^$" or (character == "+" and parts[-1:] == ["}"])):
            raise Unsupported(f"{character} in a pattern")
        else:
            inside = character == "[" or (inside and character != "]")
            ahead = pattern[match.end() : match.end() + 1]
            group = not inside and character == "(" and ahead != "?"
            parts.append("(?:" if group else character)
    return "".join(parts)


def level_of(text: str) -> int:
    """Return the smallest of `LEVELS` that no code point of `text` exceeds."""
    if text.isascii():
        return LEVELS[0]
    narrow = len(text.encode("utf-16-le", "surrogatepass")) == 2 * len(text)
    return LEVELS[1] if narrow else LEVELS[2]


class Pattern:
    """Pattern of a tokenizer that cuts texts into words, with a variant for each of `LEVELS`."""

    def __init__(self, pattern: str) -> None:
        """Raise Unsupported for a pattern that `re` cannot express."""
        self._source = pattern
        self._compiled: dict[int, re.Pattern[str]] = {}
        self._variant(LEVELS[0])

    def _variant(self, level: int) -> re.Pattern[str]:
        if level not in self._compiled:
            try:
                self._compiled[level] = re.compile(rewritten(self._source, level))
            except re.error as error:
                raise Unsupported(f"a pattern that Python's re refuses ({error})") from None
        return self._compiled[level]

    def cut(self, text: str) -> list[str]:
        """Return the matches and what lies between them, which together are `text`."""
        pattern = self._variant(level_of(text))
        words: list[str] = pattern.findall(text)
        if sum(map(len, words)) == len(text):
            return words if all(words) else [word for word in words if word]
        ends = [0, *itertools.chain.from_iterable(m.span() for m in pattern.finditer(text))]
        pairs = zip(ends, [*ends[1:], len(text)], strict=True)
        return [text[start:end] for start, end in pairs if end > start]
