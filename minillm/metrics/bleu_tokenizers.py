"""Tokenizers of BLEU: 13a and intl after NIST's scripts mteval-v13a.pl and mteval-v14.pl.

They are not those of a model: a score depends on the words that it counts, so papers name them.
"""

from __future__ import annotations

import functools
import re
import sys
import unicodedata
from collections.abc import Callable, Mapping

ENTITIES = (("&quot;", '"'), ("&amp;", "&"), ("&lt;", "<"), ("&gt;", ">"))
# Rules apply one after another, each to the result of the last.
RULES_13A = (
    (re.compile(r"([ -&(-+/:-@\[-`{-~])"), r" \1 "),  # ASCII without ' , - . and alphanumerics
    (re.compile(r"([^0-9])([.,])"), r"\1 \2 "),  # no decimal point
    (re.compile(r"([.,])([^0-9])"), r" \1 \2"),
    (re.compile(r"([0-9])(-)"), r"\1 \2 "),
)


def tokens_13a(text: str) -> list[str]:
    """Return words, numbers and ASCII punctuation; entities are resolved, line ends joined."""
    text = text.replace("<skipped>", "").replace("-\n", "").replace("\n", " ")
    for entity, character in ENTITIES:
        text = text.replace(entity, character)
    text = f" {text} "
    for pattern, parts in RULES_13A:
        text = pattern.sub(parts, text)
    return text.split()


def tokens_intl(text: str) -> list[str]:
    """Return words, numbers, punctuation and symbols of any script.

    Punctuation inside a number stays in it, and so does that behind a number at the end of a line.
    """
    for pattern, parts in _rules_intl():
        text = pattern.sub(parts, text)
    return text.split()


@functools.cache
def _rules_intl() -> tuple[tuple[re.Pattern[str], str], ...]:
    number, mark, symbol = (_characters(category) for category in "NPS")
    return (
        (re.compile(f"([^{number}])([{mark}])"), r"\1 \2 "),
        (re.compile(f"([{mark}])([^{number}])"), r" \1 \2"),
        (re.compile(f"([{symbol}])"), r" \1 "),
    )


def _characters(category: str) -> str:
    """Return the ranges of a character class: the characters of a Unicode category such as P."""
    ranges: list[list[int]] = []
    for code in range(sys.maxunicode + 1):
        if unicodedata.category(chr(code))[0] != category:
            continue
        if ranges and ranges[-1][1] == code - 1:
            ranges[-1][1] = code
        else:
            ranges.append([code, code])
    return "".join(f"\\U{first:08x}-\\U{last:08x}" for first, last in ranges)


TOKENIZERS: Mapping[str, Callable[[str], list[str]]] = {
    "13a": tokens_13a,
    "intl": tokens_intl,
    "char": lambda text: list("".join(text.split())),
    "none": str.split,
}
