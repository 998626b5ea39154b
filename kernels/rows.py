"""Row blocks of a given size over the pool."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from minillm.kernels.pool import parallel_for

SUM_BYTES = 128 << 10  # of one array in a block that is summed
BLOCK_BYTES = 1 << 20  # of one array in a block: a few of them fit in a second-level cache


def row_blocks(num_rows: int, row_bytes: int, fn: Callable[[slice], None]) -> None:
    """Call fn(rows) over the pool on blocks of about BLOCK_BYTES.

    Fused passes over such rows stay in cache. The number of threads changes no block: a BLAS may
    add a row in another order when it stands elsewhere in its block.
    """
    _blocks(num_rows, max(1, BLOCK_BYTES // max(1, row_bytes)), lambda number, rows: fn(rows))


def block_sums(x: Any, width: int, fn: Callable[[slice, Any], None]) -> Any:
    """Return the sum [width, D] of what fn(rows, out) adds to a zeroed `out` [width, D].

    The blocks of rows of x [rows, D] are those of the shape alone, so the number of threads changes
    no bit.
    """
    num_rows, D = x.shape
    size = max(8, SUM_BYTES // (D * x.itemsize))
    sums = np.zeros((-(-num_rows // size), width, D), x.dtype)
    _blocks(num_rows, size, lambda number, rows: fn(rows, sums[number]))
    return sums.sum(0)


def _blocks(num_rows: int, size: int, fn: Callable[[int, slice], None]) -> None:
    """Call fn(number, rows) over the pool on blocks of `size` rows, the last of what is left."""

    def run(start: int, stop: int) -> None:
        for number in range(start, stop):
            fn(number, slice(number * size, min((number + 1) * size, num_rows)))

    parallel_for(-(-num_rows // size), run)
