"""Layer normalisation (Ba et al. 2016, arXiv:1607.06450), row by row."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver


def layernorm_forward(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any, Any]:
    """y = (x - mean) rstd weight + bias, with rstd = 1 / sqrt(variance + eps) of each row.

    x: [..., D]; weight: [D]; bias: [D] or None.
    delta: [..., D], a residual branch: x + delta is normalised, and written into `sum_out`.
    delta_bias: [D] or None, added to delta.
    Returns y [..., D], mean [rows] and rstd [rows]; on a GPU mean and rstd are float32.
    """
    if delta is not None:
        x = x + (delta if delta_bias is None else delta + delta_bias)
        if sum_out is not None:
            sum_out[...] = x
    mean = x.mean(-1, keepdims=True)
    variance = ((x - mean) ** 2).mean(-1, keepdims=True)
    rstd = 1 / np.sqrt(variance + eps)
    y = (x - mean) * rstd * weight
    return (y if bias is None else y + bias), mean.reshape(-1), rstd.reshape(-1)


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
    """Gradients of x [..., D], weight [D] and bias [D], each None where it is not needed.

    With z = (x - mean) rstd, the Jacobian of z by x is (I - 1/D - z z^T / D) rstd.

    grad_y, x: [..., D]; mean, rstd: [rows], as the forward pass returned them.
    grad_x_out: contiguous rows that take the gradient of x; may be `grad_y` itself.
    grad_sum: [..., D], the gradient that reaches x around the norm; added to that of x.
    grad_weight_out, grad_bias_out: [D], take the gradients of the parameters.
    """
    shape, D = x.shape, x.shape[-1]
    x, grad_y = x.reshape(-1, D), grad_y.reshape(-1, D)
    z = (x - mean[:, None]) * rstd[:, None]
    grad_weight, grad_bias = (grad_y * z).sum(0), grad_y.sum(0)
    grad_x = None
    if need_x:
        grad_x = np.empty_like(x)
        for i in range(len(x)):
            jacobian = (np.eye(D) - 1 / D - np.outer(z[i], z[i]) / D) * rstd[i]
            grad_x[i] = jacobian @ (grad_y[i] * weight)
        grad_x = grad_x.reshape(shape)
        if grad_sum is not None:
            grad_x += grad_sum
        if grad_x_out is not None:
            grad_x_out[...] = grad_x
            grad_x = grad_x_out
    if not need_params:
        return grad_x, None, None
    grad_weight = deliver(grad_weight, grad_weight_out)
    return grad_x, grad_weight, deliver(grad_bias, grad_bias_out) if has_bias else None
