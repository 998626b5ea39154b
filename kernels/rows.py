"""Row blocks of a given size over the pool."""

from __future__ import annotations

from collections.abc import Callable

from minillm.kernels.pool import parallel_for

BLOCK_BYTES = 1 << 20  # of one array in a block: a few of them fit in a second-level cache


def row_blocks(num_rows: int, row_bytes: int, fn: Callable[[slice], None]) -> None:
    """Call fn(rows) over the pool on blocks of about BLOCK_BYTES.

    Fused passes over such rows stay in cache.
    """
    size = max(1, BLOCK_BYTES // max(1, row_bytes))

    def run(start: int, stop: int) -> None:
        for first in range(start, stop, size):
            fn(slice(first, min(first + size, stop)))

    parallel_for(num_rows, run, size)
