"""How work is laid out over the threads of a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def blocks(count: int, threads: int) -> int:
    """How many blocks of `threads` hold `count` threads."""
    return -(-count // threads)


def runs(count: int, dtype: Any) -> int:
    """How many runs of 16 bytes `count` elements are: what one thread takes in most kernels."""
    return -(-count * np.dtype(dtype).itemsize // 16)


def threads_for(D: int, dtype: Any, most: int = 512) -> int:
    """Threads of a block that walks along a row of D elements: one for each run, in powers of two,
    a warp at least and `most` at most."""
    threads = 32
    while threads < min(most, runs(D, dtype)):
        threads *= 2
    return threads


class Rows(NamedTuple):
    """A row in the registers of a warp, or of a block of several: `values` elements a thread,
    `threads` for a row, `rows` for a block."""

    values: int
    threads: int
    rows: int

    @property
    def block(self) -> tuple[int, int]:
        return self.threads, self.rows


MOST_THREADS = 256  # of a block of a row kernel
MOST_VALUES = 32  # in the registers of a thread
WIDEST_ROW = MOST_THREADS * MOST_VALUES


def rows_in_registers(D: int, most_values: int = MOST_VALUES) -> Rows:
    """The layout for rows of D elements: one warp a row, four rows a block, as long as
    `most_values` elements a thread suffice for that. Raises ValueError for rows that 256 threads
    cannot hold."""
    threads = 32
    while threads * most_values < D:
        threads *= 2
    if threads > MOST_THREADS:
        most = most_values * MOST_THREADS
        raise ValueError(
            f"a norm's kernel holds a row in the registers of a block, so rows have up to {most} "
            f"elements, and this one {D}"
        )
    values = max(8, blocks(D, 8 * threads) * 8)
    return Rows(values, threads, 4 if threads == 32 else 1)
