"""Matrix products by NumPy's BLAS, one call for each slice of the longer side of the result.

The slices are divided over the pool. A column sum is a product with ones, the fastest way in
BLAS.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, vector
from minillm.kernels.pool import get_threads, parallel_for
from minillm.kernels.registry import kernel

ACCUMULATE_BLOCK = 1 << 18  # elements of a product that are added while they are still in cache


@kernel("matmul")
def matmul(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    M, N = a.shape[0], b.shape[1]
    if out is None:
        out = np.empty((M, N), a.dtype)
    if sums is not None:
        column_sum(a.T, sums)
    by_rows = M >= N

    def run(start: int, stop: int) -> None:
        part = slice(start, stop)
        left, right, target = (a[part], b, out[part]) if by_rows else (a, b[:, part], out[:, part])
        if not accumulate:
            np.matmul(left, right, out=target)
            if bias is not None:
                target += bias if by_rows else bias[part]
            return
        step = max(16, ACCUMULATE_BLOCK // max(1, target.shape[1]))
        for first in range(0, target.shape[0], step):
            target[first : first + step] += left[first : first + step] @ right

    if get_threads() == 1:
        run(0, max(M, N))
    else:
        parallel_for(max(M, N), run, 16)
    return out


@kernel("column_sum")
def column_sum(x: Any, out: Any = None) -> Any:
    total = vector(x.shape[1], x.dtype, x, out)
    ones = np.ones(x.shape[0], x.dtype)

    def run(start: int, stop: int) -> None:
        np.matmul(ones, x[:, start:stop], out=total[start:stop])

    parallel_for(x.shape[1], run, 64)
    return deliver(total, out)
