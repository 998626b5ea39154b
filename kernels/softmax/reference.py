"""Softmax over the last dim."""

from __future__ import annotations

from typing import Any

import numpy as np


def softmax_forward(x: Any) -> Any:
    """exp(x - max) / sum over the last dim, x [..., n]."""
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def softmax_backward(grad_y: Any, y: Any) -> Any:
    """Gradient of x from that of y = softmax(x), by the Jacobian diag(y) - y y^T of each row."""
    grad_x = np.empty_like(y)
    for row in np.ndindex(y.shape[:-1]):
        grad_x[row] = (np.diag(y[row]) - np.outer(y[row], y[row])) @ grad_y[row]
    return grad_x
