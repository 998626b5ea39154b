"""Optimizer updates in place."""

from __future__ import annotations

from typing import Any

import numpy as np


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
    """One AdamW update (Loshchilov and Hutter 2019, arXiv:1711.05101, algorithm 2) in place.

    param, exp_avg, exp_avg_sq: [n], overwritten. grad: [n], may have a narrower dtype.
    step: counts from 1.
    grad_scale: factor of grad, a number or an array of one element. NaN makes the update a no-op:
    the GPU skips a step in this way without telling the host.
    param_out: [n], takes a copy of param in its own dtype.
    """
    if np.isnan(grad_scale):
        return
    g = grad * grad_scale
    exp_avg[...] = beta1 * exp_avg + (1 - beta1) * g
    exp_avg_sq[...] = beta2 * exp_avg_sq + (1 - beta2) * g * g
    m_hat, v_hat = exp_avg / (1 - beta1**step), exp_avg_sq / (1 - beta2**step)
    param -= lr * weight_decay * param + lr * m_hat / (np.sqrt(v_hat) + eps)
    if param_out is not None:
        param_out[...] = param


def sgd_(param: Any, grad: Any, *, lr: float, grad_scale: Any = 1.0) -> None:
    """param -= lr grad_scale grad in place.

    param, grad: [n]. grad_scale: as in `adamw_`.
    """
    if not np.isnan(grad_scale):
        param -= lr * grad_scale * grad
