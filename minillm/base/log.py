"""Output of a run: log lines. Rank 0 writes all."""

from __future__ import annotations

import contextlib
import os
import shutil
import sys
import textwrap
from collections.abc import Sequence
from typing import TextIO

WIDTH = 80  # columns of a paragraph at most, and of a terminal of unknown width
LABEL = 8  # columns of the word that begins a line of the plan or of the result


class Log:
    """Log to standard output on rank 0; silent on other ranks."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def __call__(self, text: str = "") -> None:
        """Print a line and flush, because a launcher's pipe buffers."""
        if self.rank == 0:
            print(text, flush=True)


def plural(number: int, word: str, ending: str = "s") -> str:
    """Return a number and its noun: 1 rank, 2 ranks."""
    return f"{number} {word}{ending if number != 1 else ''}"


def paragraph(label: str, text: str) -> str:
    """Return `text` behind a label, in lines of at most 80 columns that begin below one another.

    A word that is longer than a line stays whole.
    """
    return textwrap.fill(
        text,
        min(WIDTH, columns()),
        initial_indent=f"{label:<{LABEL}}",
        subsequent_indent=" " * LABEL,
        break_long_words=False,
        break_on_hyphens=False,
    )


def fitted(fields: Sequence[str], width: int) -> str:
    """Join the first fields that fit into `width` columns together; the first is always there."""
    line = fields[0]
    for field in fields[1:]:
        if len(line) + 2 + len(field) > width:
            break
        line += f"  {field}"
    return line


def columns(stream: TextIO | None = None) -> int:
    """Return the width of the stream's terminal, by default of standard output; else 80."""
    with contextlib.suppress(OSError, ValueError):
        found = os.get_terminal_size((stream or sys.stdout).fileno()).columns
        if found > 0:
            return found
    return shutil.get_terminal_size((80, 24)).columns


def compact(number: float) -> str:
    """Format a number with three digits and a unit: 1234567 is 1.23M, 12345 is 12.3k."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{unit}"
    return f"{number:.3g}"


def clock(seconds: float) -> str:
    """Format a duration: 75 is 1:15, 3675 is 1:01:15."""
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
