"""Root-mean-square normalisation (Zhang and Sennrich 2019, arXiv:1910.07467), row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver


def rmsnorm_forward(
    x: Any,
    weight: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any]:
    """y = x rstd weight, with rstd = 1 / sqrt(mean(x^2) + eps) of each row.

    x: [..., D]; weight: [D].
    delta: [..., D], a residual branch: x + delta is normalised, and written into `sum_out`.
    delta_bias: [D] or None, added to delta.
    Returns y [..., D] and rstd [rows]; on a GPU rstd is float32.
    """
    if delta is not None:
        x = x + (delta if delta_bias is None else delta + delta_bias)
        if sum_out is not None:
            sum_out[...] = x
    rstd = 1 / np.sqrt((x * x).mean(-1, keepdims=True) + eps)
    return x * rstd * weight, rstd.reshape(-1)


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
    """Gradients of x [..., D] and weight [D], each None where it is not needed.

    With z = x rstd, the Jacobian of z by x is (I - z z^T / D) rstd.

    grad_y, x: [..., D]; rstd: [rows], as the forward pass returned it.
    grad_x_out: contiguous rows that take the gradient of x; may be `grad_y` itself.
    grad_sum: [..., D], the gradient that reaches x around the norm; added to that of x.
    grad_weight_out: [D], takes the gradient of the weight.
    """
    shape, D = x.shape, x.shape[-1]
    x, grad_y = x.reshape(-1, D), grad_y.reshape(-1, D)
    z = x * rstd[:, None]
    grad_weight = deliver((grad_y * z).sum(0), grad_weight_out) if need_params else None
    if not need_x:
        return None, grad_weight
    grad_x = np.empty_like(x)
    for i in range(len(x)):
        grad_x[i] = (np.eye(D) - np.outer(z[i], z[i]) / D) @ (grad_y[i] * weight) * rstd[i]
    grad_x = grad_x.reshape(shape)
    if grad_sum is not None:
        grad_x += grad_sum
    if grad_x_out is not None:
        grad_x_out[...] = grad_x
        grad_x = grad_x_out
    return grad_x, grad_weight
