"""Cases of the kernel test: matmul."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from minillm.kernels.case import Arrays, Case, normals, poisoned, strided

from minillm import kernels


def cases() -> Iterator[Case]:
    few_rows, deep = ((1, 70, 300), (6, 33, 50), (8, 129, 1025)), ((30, 1100, 47), (65, 550, 9))
    for M, K, N in (
        (0, 3, 4),
        (3, 0, 4),
        (1, 1, 1),
        (5, 7, 3),
        *few_rows,
        *deep,
        (300, 257, 129),
        (33, 300, 1025),
        (900, 64, 130),
    ):
        size, make = f"{M}x{K}x{N}", normals((M, K), (K, N), (M, N))
        yield Case(
            "matmul", size, make, lambda a, b, c: (kernels.matmul(a, b),), lambda a, b, c: (a @ b,)
        )
        yield Case(
            "matmul",
            f"bias-{size}",
            normals((M, K), (K, N), (N,)),
            lambda a, b, bias: (
                kernels.matmul(a, b, bias=bias),
                kernels.matmul(a, np.ascontiguousarray(b.T).T, out=poisoned(a @ b), bias=bias),
            ),
            lambda a, b, bias: (a @ b + bias,) * 2,
        )
        yield Case(
            "matmul",
            f"{size}-out-transposed",
            make,
            lambda a, b, c: (
                kernels.matmul(
                    np.ascontiguousarray(a.T).T, np.ascontiguousarray(b.T).T, out=poisoned(c)
                ),
            ),
            lambda a, b, c: (a @ b,),
        )
        yield Case(
            "matmul",
            f"{size}-accumulate",
            make,
            lambda a, b, c: (
                kernels.matmul(
                    strided(a), np.ascontiguousarray(b.T).T, out=c.copy(), accumulate=True
                ),
            ),
            lambda a, b, c: (c + a @ b,),
        )
        yield Case(
            "matmul", f"sums-{size}", make, product_and_sums, lambda a, b, c: (a @ b, a.sum(1))
        )
    for shape in ((0, 3), (1, 1), (5, 7), (2000, 130)):
        yield Case(
            "column_sum",
            f"{shape}",
            normals(shape),
            lambda x: (kernels.column_sum(x),),
            lambda x: (x.sum(0),),
        )
        yield Case(
            "column_sum",
            f"into-{shape}",
            normals(shape),
            lambda x: into_vector(x, lambda out: kernels.column_sum(x, out)),
            lambda x: (x.sum(0),),
        )


def into_vector(x: Any, run: Callable[[Any], Any]) -> Arrays:
    """Call `run` with a vector of NaN for the sums of x's columns, which it must return."""
    out = np.full(x.shape[1], np.nan, np.float32 if x.itemsize == 2 else x.dtype)
    assert run(out) is out
    return (out,)


def product_and_sums(a: Any, b: Any, c: Any) -> Arrays:
    sums = np.full(len(a), np.nan, np.float32 if a.itemsize == 2 else a.dtype)
    return kernels.matmul(np.ascontiguousarray(a.T).T, b, sums=sums), sums
