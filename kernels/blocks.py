"""Rows cut into blocks that stay in the processor's cache, so that a chain of NumPy calls reads memory once.

The cut depends on the shape alone, not on the number of threads: sums over rows have the same bits on any number of threads.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
from minillm.kernels.pool import parallel_for

Array = Any  # numpy.ndarray or cupy.ndarray

BLOCK_BYTES = (
    1 << 17
)  # of one array in a block: a few of them fit in a second-level cache, and a NumPy call on one costs well above its overhead
_EVEN = 4  # the number of blocks is a multiple of this, so that two or four threads have equal shares


def namespace(x: Array) -> ModuleType:
    """The module (`numpy` or `cupy`) whose array `x` is."""
    if isinstance(x, np.ndarray):
        return np
    import importlib

    return importlib.import_module(type(x).__module__.partition(".")[0])


class RowBlocks:
    """The rows of `x` [rows, D] in blocks of about BLOCK_BYTES; one block of all rows if `x` is not a NumPy array."""

    def __init__(self, x: Array, block_bytes: int = BLOCK_BYTES) -> None:
        self.like = x
        self.rows = len(x)
        row_bytes = max(1, x.itemsize * (x.size // max(1, self.rows)))
        count = -(-self.rows * row_bytes // block_bytes) if isinstance(x, np.ndarray) else 1
        if count > 1:
            count = -(-count // _EVEN) * _EVEN
        self.step = max(1, -(-self.rows // max(1, count)))
        self.count = -(-self.rows // self.step)

    def run(self, fn: Callable[..., None], scratch: int = 0) -> None:
        """Call fn(index, part, *scratch) on every block over the thread pool: the block's number, its rows as a slice, and `scratch` arrays
        of its shape."""
        shape = (self.step, *self.like.shape[1:])
        xp = namespace(self.like)

        def several(start: int, stop: int) -> None:
            buffers = [xp.empty(shape, self.like.dtype) for _ in range(scratch)]
            for i in range(start, stop):
                part = slice(i * self.step, min((i + 1) * self.step, self.rows))
                fn(i, part, *(buffer[: part.stop - part.start] for buffer in buffers))

        parallel_for(self.count, several)
