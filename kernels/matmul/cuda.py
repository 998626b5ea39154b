"""Column sums on the GPU. Matrix products are cuBLAS's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.cuda import cuda_kernel
from minillm.kernels.grids import blocks, runs
from minillm.kernels.launch import dense, element, empty, launch, multiprocessors

_FILE = Path(__file__).with_name("column_sum.cu")
_WARPS = 8
_FEW_ROWS = 512  # that one launch sums


@cuda_kernel("column_sum")
def column_sum(x: Any) -> Any:
    return sum_rows(dense(x)[None])[0]


def sum_rows(x: Any) -> Any:
    """The sums over rows, float32 [n, D], of a contiguous x [n, rows, D]. The order of the sum depends on the sizes and the device only."""
    n, rows, D = x.shape
    tiles = blocks(runs(D, x.dtype), 32)
    parts = 1 if rows <= _FEW_ROWS else min(blocks(rows, 8 * _WARPS), max(1, 8 * multiprocessors(x) // max(1, n * tiles)))
    out = empty((n, parts, D), np.float32, x)
    each = blocks(rows, parts)
    args = (x, out, np.int64(rows), np.int64(each), np.int32(D))
    launch(_FILE, "column_sum", {"ELEMENT": element(x)}, (tiles, parts, n), (32, _WARPS), args)
    return out.reshape(n, D) if parts == 1 else sum_rows(out)
