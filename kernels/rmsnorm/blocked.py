"""Root-mean-square normalisation in NumPy, in blocks of rows that stay in cache.

With z = x rstd and g = grad_y weight: grad_x = (g - z mean(g z)) rstd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver
from minillm.kernels.registry import kernel
from minillm.kernels.rows import block_sums, row_blocks


@kernel("rmsnorm_forward")
def rmsnorm_forward(
    x: Any,
    weight: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any]:
    shape = x.shape
    if delta is not None:
        x = np.add(x, delta if delta_bias is None else delta + delta_bias, out=sum_out)
    x = x.reshape(-1, shape[-1])
    y, rstd = np.empty_like(x), np.empty(len(x), x.dtype)

    def run(rows: slice) -> None:
        block = x[rows]
        scale = 1 / np.sqrt(
            np.einsum("ij,ij->i", block, block) / x.dtype.type(x.shape[1]) + x.dtype.type(eps)
        )
        np.multiply(block, scale[:, None], out=y[rows])
        y[rows] *= weight
        rstd[rows] = scale

    row_blocks(len(x), x.shape[1] * x.itemsize * 2, run)
    return y.reshape(shape), rstd


@kernel("rmsnorm_backward")
def rmsnorm_backward(
    grad_y: Any,
    x: Any,
    weight: Any,
    rstd: Any,
    need_x: bool = True,
    need_params: bool = True,
    grad_x_out: Any = None,
    grad_sum: Any = None,
    grad_weight_out: Any = None,
) -> tuple[Any, Any]:
    shape, D = x.shape, x.shape[-1]
    x, grad_y, grad_x_out, grad_sum = (
        None if a is None else a.reshape(-1, D) for a in (x, grad_y, grad_x_out, grad_sum)
    )
    grad_x = (np.empty_like(x) if grad_x_out is None else grad_x_out) if need_x else None

    def block(rows: slice, sums: Any) -> None:
        z, dy = x[rows] * rstd[rows, None], grad_y[rows]
        if need_params:
            np.einsum("ij,ij->j", dy, z, out=sums[0])
        if grad_x is not None:
            g = dy * weight
            z *= (np.einsum("ij,ij->i", g, z) / x.dtype.type(D))[:, None]
            g -= z
            np.multiply(g, rstd[rows, None], out=grad_x[rows])
            if grad_sum is not None:
                grad_x[rows] += grad_sum[rows]

    sums = block_sums(x, 1, block)
    grad_weight = deliver(sums[0], grad_weight_out) if need_params else None
    return None if grad_x is None else grad_x.reshape(shape), grad_weight
