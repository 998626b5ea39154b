"""Layer normalisation in NumPy, in blocks of rows that stay in cache.

With z = (x - mean) rstd and g = grad_y weight: grad_x = (g - mean(g) - z mean(g z)) rstd.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver
from minillm.kernels.registry import kernel
from minillm.kernels.rows import block_sums, row_blocks


@kernel("layernorm_forward")
def layernorm_forward(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any, Any]:
    shape = x.shape
    if delta is not None:
        x = np.add(x, delta if delta_bias is None else delta + delta_bias, out=sum_out)
    x = x.reshape(-1, shape[-1])
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
    averages = np.full(D, 1 / D, x.dtype)

    def block(rows: slice, sums: Any) -> None:
        z = (x[rows] - mean[rows, None]) * rstd[rows, None]
        dy = grad_y[rows]
        if need_params:
            np.einsum("ij,ij->j", dy, z, out=sums[0])
            dy.sum(0, out=sums[1])
        if grad_x is not None:
            g = dy * weight
            along = np.einsum("ij,ij->i", g, z) / x.dtype.type(D)
            z *= along[:, None]
            g -= (g @ averages)[:, None]
            g -= z
            np.multiply(g, rstd[rows, None], out=grad_x[rows])
            if grad_sum is not None:
                grad_x[rows] += grad_sum[rows]

    sums = block_sums(x, 2, block)
    if grad_x is not None:
        grad_x = grad_x.reshape(shape)
    if not need_params:
        return grad_x, None, None
    grad_weight = deliver(sums[0], grad_weight_out)
    return grad_x, grad_weight, deliver(sums[1], grad_bias_out) if has_bias else None
