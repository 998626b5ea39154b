"""Ranges of numbers in words: cores of a mask, ranks of a message."""

from __future__ import annotations

from collections.abc import Iterable


def ranges(numbers: Iterable[int]) -> str:
    """Return distinct numbers in ascending order, runs of three or more as in "0-3,7,9"."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )


def read_ranges(text: str) -> set[int]:
    """Return the numbers of a text as "0-3,7", the inverse of `ranges`.

    Raises ValueError for other texts.
    """
    found: set[int] = set()
    for word in filter(None, text.strip().split(",")):
        first, _, last = word.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
