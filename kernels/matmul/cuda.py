"""Matrix products on the GPU, by cuBLAS; column sums, by a kernel of our own."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from minillm.kernels.arrays import deliver, dense, empty, vector
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import element, launch, multiprocessors, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel, unavailable
from minillm.kernels.registry import kernel, lookup

_FILE = Path(__file__).with_name("column_sum.cu")
_WARPS = 8
_FEW_ROWS = 512  # that one launch sums


# cudaDataType and cublasComputeType_t of library_types.h and cublas_api.h.
CUDA_TYPES = {"float32": 0, "float16": 2, "bfloat16": 14}
COMPUTE_FLOAT32 = 68  # products of 16-bit numbers are exact in it, and float32 is not cut to TF32
DEFAULT_ALGORITHM = -1
_ONE, _ZERO = (
    np.array(1, np.float32),
    np.array(0, np.float32),
)  # alpha and beta are read on the host, by address


class Operand(NamedTuple):
    """Matrix as cuBLAS sees it, column by column.

    `transposed`: cuBLAS reads it transposed.
    """

    pointer: int
    leading: int
    transposed: bool


def operand(x: Any) -> Operand:
    """Return the operand of a C-contiguous matrix, or of a transposed view of one.

    A row-major matrix is its own transpose in column-major order. Raises ValueError for other
    strides, which would need a hidden copy.
    """
    item = x.dtype.itemsize
    (rows, columns), (down, across) = x.shape, x.strides
    if (across == item or columns == 1) and (down >= columns * item or rows == 1):
        return Operand(x.data.ptr, down // item if rows > 1 else max(columns, 1), False)
    if (down == item or rows == 1) and (across >= rows * item or columns == 1):
        return Operand(x.data.ptr, across // item if columns > 1 else max(rows, 1), True)
    raise ValueError(
        f"a product takes matrices whose rows or columns lie together, not strides {x.strides} for "
        f"shape {x.shape}"
    )


@kernel(
    "matmul", backend="cuda", variant="cublas", dtypes=tuple(CUDA_TYPES), unavailable=unavailable
)
def matmul(
    a: Any, b: Any, out: Any = None, accumulate: bool = False, bias: Any = None, sums: Any = None
) -> Any:
    out, done = checked_product(a, b, out, accumulate, bias, sums)
    if sums is not None:
        row_sums(a, sums)
    if not done:
        gemm(a, b, out, accumulate)
        if bias is not None:
            add_to_rows(out, bias)
    return out


def add_to_rows(out: Any, bias: Any) -> None:
    """Add bias [N] to out [M, N] in a pass of its own."""
    if out.dtype == bias.dtype and out.flags.c_contiguous:
        lookup("add_bias_", out)(out, bias)
    else:
        out += bias


def row_sums(a: Any, out: Any) -> None:
    """Write the sum of each row of a [M, K] to `out` [M], in a pass of its own."""
    lookup("column_sum", a)(a.T, out)


def checked_product(
    a: Any, b: Any, out: Any, accumulate: bool, bias: Any, sums: Any
) -> tuple[Any, bool]:
    """Return the output of the product of a [M, K] and b [K, N], and whether it is complete.

    It is complete if one of the sizes is 0. Raises ValueError for shapes that do not match,
    TypeError for mixed dtypes.
    """
    same_dtype(a, b, bias)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[0]:
        raise ValueError(
            f"a product of {a.shape} and {b.shape}: two matrices are wanted whose inner sizes agree"
        )
    (M, K), N = a.shape, b.shape[1]
    if out is None:
        out = empty((M, N), a.dtype, a)
    if out.shape != (M, N) or (out.dtype != a.dtype and element(out) != "float32"):
        raise ValueError(
            f"the product of {a.shape} and {b.shape} in {a.dtype} does not go into {out.shape} of "
            f"{out.dtype}"
        )
    if accumulate and bias is not None:
        raise ValueError("a product that is added to another takes no bias")
    if sums is not None and (sums.shape != (M,) or element(sums) != "float32" or bias is not None):
        raise ValueError(
            f"sums of {M} rows, of a product without a bias, go into as many float32, not into "
            f"{sums.shape} of {sums.dtype}"
        )
    if M and N and operand(out).transposed:
        raise ValueError(
            f"a product is written row by row, not with strides {out.strides} for shape {out.shape}"
        )
    if M and N and K:
        return out, False
    if not accumulate:
        out.fill(0)
        if bias is not None:
            add_to_rows(out, bias)
    return out, True


def gemm(a: Any, b: Any, out: Any, accumulate: bool) -> None:
    """Compute out [M, N] (+)= a [M, K] b [K, N], none of them empty.

    In column-major order that is out^T = b^T a^T.
    """
    left, right, target = operand(b), operand(a), operand(out)
    cupy = importlib.import_module("cupy")
    cupy.cuda.cublas.gemmEx(
        cupy.cuda.get_cublas_handle(),
        *(int(left.transposed), int(right.transposed), b.shape[1], a.shape[0], a.shape[1]),
        _ONE.ctypes.data,
        *(left.pointer, CUDA_TYPES[element(b)], left.leading),
        *(right.pointer, CUDA_TYPES[element(a)], right.leading),
        (_ONE if accumulate else _ZERO).ctypes.data,
        *(target.pointer, CUDA_TYPES[element(out)], target.leading),
        *(COMPUTE_FLOAT32, DEFAULT_ALGORITHM),
    )


@cuda_kernel("column_sum")
def column_sum(x: Any, out: Any = None) -> Any:
    return sum_rows(dense(x)[None], out)[0]


def sum_rows(x: Any, *outs: Any) -> list[Any]:
    """Return the sums over rows, n float32 arrays [D], of a contiguous x [n, rows, D], n at most 2.

    `outs` may name the memory of each result, such as the slot of a gradient; None leaves it to
    this function. The order of the sum depends on the sizes and the device only.
    """
    n, rows, D = x.shape
    tiles = blocks(runs(D, x.dtype), 32)
    parts = (
        1
        if rows <= _FEW_ROWS
        else min(blocks(rows, 8 * _WARPS), max(1, 8 * multiprocessors(x) // max(1, n * tiles)))
    )
    wanted = (*outs, None, None)[:n]
    left = empty((n, parts, D), np.float32, x) if parts > 1 else None
    targets = list(left) if left is not None else [vector(D, np.float32, x, o) for o in wanted]
    each = blocks(rows, parts)
    args = (x, *(*targets, None)[:2], np.int64(rows), np.int64(each), np.int32(D))
    launch(_FILE, "column_sum", {"ELEMENT": element(x)}, (tiles, parts, n), (32, _WARPS), args)
    if left is not None:
        return sum_rows(left, *outs)
    return [deliver(target, out) for target, out in zip(targets, wanted, strict=True)]
