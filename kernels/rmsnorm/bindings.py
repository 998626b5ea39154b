"""Root-mean-square normalisation in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, out_like, vector
from minillm.kernels.native import c_kernel, pool


@c_kernel("rmsnorm_forward")
def rmsnorm_forward(
    c: Any,
    x: Any,
    weight: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any]:
    x, delta = dense(x), None if delta is None else dense(delta)
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    y, rstd = np.empty(x.shape, x.dtype), np.empty(num_rows, x.dtype)
    c.rmsnorm_forward(pool(), x, delta, delta_bias, weight, sum_out, y, rstd, num_rows, D, eps)
    return y, rstd


@c_kernel("rmsnorm_backward")
def rmsnorm_backward(
    c: Any,
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
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    grad_x = out_like(x, grad_x_out) if need_x else None
    grad_weight = vector(D, x.dtype, x, grad_weight_out) if need_params else None
    grad_sum = None if grad_sum is None else dense(grad_sum)
    rows = (dense(x), weight, rstd, grad_x, grad_weight, num_rows, D)
    c.rmsnorm_backward(pool(), dense(grad_y), grad_sum, *rows)
    if need_x:
        grad_x = deliver(grad_x, grad_x_out)
    if need_params:
        grad_weight = deliver(grad_weight, grad_weight_out)
    return grad_x, grad_weight
