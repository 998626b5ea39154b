"""Matrix products in C: blocked kernels, or BLAS called on one thread for slices of the result.

The blocked kernels are faster with AVX2 and AVX-512 (docs/performance.md), BLAS with the baseline
instructions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, vector
from minillm.kernels.matmul.packed import Packed
from minillm.kernels.native import VARIANTS, blas_unavailable, c_kernel, pool
from minillm.kernels.registry import kernel


def _operand(x: Any) -> Any:
    """`x`, or a copy of it if neither its rows nor its columns are contiguous."""
    if x.flags.forc:
        return x
    (rows, columns), (along, across) = x.shape, x.strides
    return (
        x
        if (across == 4 and along >= 4 * columns) or (along == 4 and across >= 4 * rows)
        else np.ascontiguousarray(x)
    )


@c_kernel("matmul", VARIANTS[:-1])
def matmul(
    c: Any,
    a: Any,
    b: Any,
    out: Any = None,
    accumulate: bool = False,
    bias: Any = None,
    sums: Any = None,
    by_blas: bool = False,
) -> Any:
    (M, K), N = a.shape, b.shape[1]
    b, panels = b if isinstance(b, Packed) else (b, None)
    if sums is not None and not (
        N and a.T.flags.c_contiguous and sums.flags.c_contiguous and sums.dtype == np.float32
    ):
        column_sum(c, a.T, sums)
        sums = None
    if out is not None and (out.strides[1] != 4 or out.strides[0] < 4 * N):
        product = matmul(c, a, b, bias=bias, sums=sums, by_blas=by_blas)
        out[...] = out + product if accumulate else product
        return out
    target = np.empty((M, N), a.dtype) if out is None else out
    if M and N:
        sizes = (M, N, K, accumulate, by_blas)
        c.matmul(pool(), _operand(a), _operand(b), target, bias, sums, panels, *sizes)
    return target


@kernel("matmul", backend="c", variant="blas", dtypes=("float32",), unavailable=blas_unavailable)
def matmul_by_blas(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    fastest = next(variant.functions for variant in VARIANTS if variant.unavailable is None)
    return matmul(fastest, a, b, out, accumulate, bias, sums, by_blas=True)


c_kernel("matmul", VARIANTS[-1:])(matmul)


@c_kernel("column_sum")
def column_sum(c: Any, x: Any, out: Any = None) -> Any:
    num_rows, D = x.shape
    total = vector(D, x.dtype, x, out)
    c.column_sum(pool(), dense(x), total, num_rows, D)
    return deliver(total, out)
