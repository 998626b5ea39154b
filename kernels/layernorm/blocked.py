"""Layer normalisation in NumPy, in blocks of rows that stay in cache.

With z = (x - mean) rstd and g = grad_y weight: grad_x = (g - mean(g) - z mean(g z)) rstd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver
from minillm.kernels.pool import get_threads, parallel_for
from minillm.kernels.registry import kernel
from minillm.kernels.rows import row_blocks


@kernel("layernorm_forward")
def layernorm_forward(
    x: Any, weight: Any, bias: Any, eps: float, delta: Any = None, sum_out: Any = None
) -> tuple[Any, Any, Any]:
    shape = x.shape
    x = (x if delta is None else np.add(x, delta, out=sum_out)).reshape(-1, shape[-1])
    y = np.empty_like(x)
    mean, rstd = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    averages = np.full(x.shape[1], 1 / x.shape[1], x.dtype)

    def run(rows: slice) -> None:
        block = y[rows]
        mu = x[rows] @ averages
        np.subtract(x[rows], mu[:, None], out=block)
        variance = np.einsum("ij,ij->i", block, block) / x.dtype.type(x.shape[1])
        scale = 1 / np.sqrt(variance + x.dtype.type(eps))
        block *= scale[:, None]
        block *= weight
        if bias is not None:
            block += bias
        mean[rows], rstd[rows] = mu, scale

    row_blocks(len(x), x.shape[1] * x.itemsize * 2, run)
    return y.reshape(shape), mean, rstd


@kernel("layernorm_backward")
def layernorm_backward(
    grad_y: Any,
    x: Any,
    weight: Any,
    mean: Any,
    rstd: Any,
    need_x: bool = True,
    need_params: bool = True,
    has_bias: bool = True,
    grad_x_out: Any = None,
    grad_sum: Any = None,
    grad_weight_out: Any = None,
    grad_bias_out: Any = None,
) -> tuple[Any, Any, Any]:
    shape, D = x.shape, x.shape[-1]
    x, grad_y, grad_x_out, grad_sum = (
        None if a is None else a.reshape(-1, D) for a in (x, grad_y, grad_x_out, grad_sum)
    )
    grad_x = (np.empty_like(x) if grad_x_out is None else grad_x_out) if need_x else None
    partial: list[tuple[int, Any, Any]] = []
    averages = np.full(D, 1 / D, x.dtype)

    def block(rows: slice, sums: tuple[Any, Any]) -> None:
        z = (x[rows] - mean[rows, None]) * rstd[rows, None]
        dy = grad_y[rows]
        if need_params:
            sums[0][...] += np.einsum("ij,ij->j", dy, z)
            sums[1][...] += dy.sum(0)
        if grad_x is not None:
            g = dy * weight
            along = np.einsum("ij,ij->i", g, z) / x.dtype.type(D)
            z *= along[:, None]
            g -= (g @ averages)[:, None]
            g -= z
            np.multiply(g, rstd[rows, None], out=grad_x[rows])
            if grad_sum is not None:
                grad_x[rows] += grad_sum[rows]

    _with_sums(len(x), D, x, partial, block)
    if grad_x is not None:
        grad_x = grad_x.reshape(shape)
    if not need_params:
        return grad_x, None, None
    ordered = [sums for _, *sums in sorted(partial, key=lambda item: item[0])]
    grad_weight = sum((s[0] for s in ordered), np.zeros(D, x.dtype))
    grad_bias = sum((s[1] for s in ordered), np.zeros(D, x.dtype))
    grad_weight = deliver(grad_weight, grad_weight_out)
    return grad_x, grad_weight, deliver(grad_bias, grad_bias_out) if has_bias else None


def _with_sums(num_rows: int, D: int, x: Any, partial: list, block: Any) -> None:
    """Run `block` over cache-sized row blocks, with parameter sums for each thread.

    Appends the sums to `partial` with their position.
    """
    step = max(1, (128 << 10) // (D * x.itemsize))

    def run(start: int, stop: int) -> None:
        sums = (np.zeros(D, x.dtype), np.zeros(D, x.dtype))
        for first in range(start, stop, step):
            block(slice(first, min(first + step, stop)), sums)
        partial.append((start, *sums))

    if get_threads() == 1:
        run(0, num_rows)
    else:
        parallel_for(num_rows, run, step)
