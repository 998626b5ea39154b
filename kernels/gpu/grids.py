"""Grids and blocks: division of work over the threads of a GPU."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np


def blocks(count: int, threads: int) -> int:
    """Return the number of blocks of `threads` that hold `count` threads."""
    return -(-count // threads)


def runs(count: int, dtype: Any) -> int:
    """Return the number of 16-byte runs in `count` elements. In most kernels a thread takes one."""
    return -(-count * np.dtype(dtype).itemsize // 16)


def threads_for(D: int, dtype: Any, most: int = 512) -> int:
    """Return the threads of a block that walks along a row of D elements.

    One thread takes one run of 16 bytes. The number is a power of two, from a warp up to `most`.
    """
    threads = 32
    while threads < min(most, runs(D, dtype)):
        threads *= 2
    return threads


class Rows(NamedTuple):
    """Layout of rows in the registers of a warp, or of a block of several warps."""

    values: int  # elements a thread
    threads: int  # for a row
    rows: int  # for a block

    @property
    def block(self) -> tuple[int, int]:
        return self.threads, self.rows


MOST_THREADS = 256  # of a block of a row kernel
MOST_VALUES = 32  # in the registers of a thread
WIDEST_ROW = MOST_THREADS * MOST_VALUES


def rows_in_registers(D: int, most_values: int = MOST_VALUES) -> Rows:
    """Return the layout of rows of D elements.

    A warp takes a row and a block four rows, if `most_values` elements a thread suffice. Raises
    ValueError for rows that 256 threads cannot hold.
    """
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
