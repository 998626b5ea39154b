"""Counts of n-grams."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any


def ngrams(items: Sequence[Any], order: int) -> Counter[Any]:
    """Return the number of occurrences of each n-gram: slices of a text, or tuples of words."""
    if not isinstance(items, str):
        items = tuple(items)
    return Counter(items[i : i + order] for i in range(len(items) - order + 1))


def matches(found: Counter[Any], wanted: Counter[Any]) -> int:
    """Return how many n-grams both have, each counted as often as in the one with fewer."""
    return sum(min(number, wanted[each]) for each, number in found.items() if each in wanted)
