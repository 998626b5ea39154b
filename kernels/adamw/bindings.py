"""Optimizer updates in C."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from minillm.kernels.native import c_kernel, pool


def _number(grad_scale: Any) -> float:
    """Return a number, given as such or as an array of one element."""
    return grad_scale if isinstance(grad_scale, float) else float(np.ravel(grad_scale)[0])


@c_kernel("adamw_")
def adamw_(
    c: Any,
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Any = 1.0,
    param_out: Any = None,
) -> None:
    grad = grad.astype(param.dtype, copy=False)
    grad_scale = _number(grad_scale)
    if math.isnan(grad_scale):
        return
    rate, inverse_root = lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)
    keep = 1 - lr * weight_decay
    c.adamw(
        pool(),
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        param.size,
        rate,
        inverse_root,
        beta1,
        beta2,
        eps,
        keep,
        grad_scale,
    )
    if param_out is not None:
        param_out[...] = param


@c_kernel("sgd_")
def sgd_(c: Any, param: Any, grad: Any, *, lr: float, grad_scale: Any = 1.0) -> None:
    grad_scale = _number(grad_scale)
    if not math.isnan(grad_scale):
        c.sgd(pool(), param, grad, param.size, lr * grad_scale)
