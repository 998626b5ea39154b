"""Optimizer updates in NumPy, in pieces that stay in cache through all their passes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from minillm.kernels.pool import parallel_for
from minillm.kernels.registry import kernel

_PIECE = 1 << 14  # elements: five arrays of it fit the second-level cache


@kernel("adamw_")
def adamw_(
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
    if np.isnan(grad_scale):
        return
    t = param.dtype.type
    rate, root = lr / (1 - beta1**step), math.sqrt(1 - beta2**step)

    def run(start: int, stop: int) -> None:
        for first in range(start, stop, _PIECE):
            part = slice(first, min(first + _PIECE, stop))
            p, m, v = param[part], exp_avg[part], exp_avg_sq[part]
            g = grad[part].astype(param.dtype, copy=False) * t(grad_scale)
            m *= t(beta1)
            m += t(1 - beta1) * g
            v *= t(beta2)
            g *= g
            g *= t(1 - beta2)
            v += g
            np.sqrt(v, out=g)
            g *= t(1 / root)
            g += t(eps)
            np.divide(m, g, out=g)
            g *= t(rate)
            if weight_decay:
                p *= t(1 - lr * weight_decay)
            p -= g
            if param_out is not None:
                param_out[part] = p

    parallel_for(param.size, run, _PIECE)


@kernel("sgd_")
def sgd_(param: Any, grad: Any, *, lr: float, grad_scale: Any = 1.0) -> None:
    if not np.isnan(grad_scale):
        param -= param.dtype.type(lr * grad_scale) * grad
