"""Layer normalisation in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.native import c_kernel, pool


@c_kernel("layernorm_forward")
def layernorm_forward(
    c: Any,
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any, Any]:
    x, delta = dense(x), None if delta is None else dense(delta)
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    y, mean, rstd = (
        np.empty(x.shape, x.dtype),
        np.empty(num_rows, x.dtype),
        np.empty(num_rows, x.dtype),
    )
    c.layernorm_forward(
        pool(), x, delta, delta_bias, weight, bias, sum_out, y, mean, rstd, num_rows, D, eps
    )
    return y, mean, rstd


@c_kernel("layernorm_backward")
def layernorm_backward(
    c: Any,
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
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    grad_x = out_like(x, grad_x_out) if need_x else None
    params = np.empty((2, D), x.dtype) if need_params else None
    grad_sum = None if grad_sum is None else dense(grad_sum)
    rows = (dense(x), weight, mean, rstd, grad_x, params, num_rows, D)
    c.layernorm_backward(pool(), dense(grad_y), grad_sum, *rows)
    if need_x:
        grad_x = deliver(grad_x, grad_x_out)
    if params is None:
        return grad_x, None, None
    grad_weight = deliver(params[0], grad_weight_out)
    return grad_x, grad_weight, deliver(params[1], grad_bias_out) if has_bias else None
