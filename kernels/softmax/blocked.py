"""Softmax over the last dim."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.registry import kernel


@kernel("softmax_forward")
def softmax_forward(x: Any) -> Any:
    """exp(x - max) / sum over the last dim."""
    y = x - x.max(-1, keepdims=True)
    np.exp(y, out=y)
    y /= y.sum(-1, keepdims=True)
    return y


@kernel("softmax_backward")
def softmax_backward(grad_y: Any, y: Any) -> Any:
    """(grad_y - <grad_y, y>) y."""
    grad = grad_y * y
    total = grad.sum(-1, keepdims=True)
    return np.subtract(grad, y * total, out=grad)
