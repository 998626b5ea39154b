"""Embedding in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import dense
from minillm.kernels.native import c_kernel, pool


@c_kernel("embedding_forward")
def embedding_forward(c: Any, ids: Any, weight: Any, first_row: int = 0) -> Any:
    V, D = weight.shape
    out = np.empty((*ids.shape, D), weight.dtype)
    c.embedding_forward(
        pool(), np.ascontiguousarray(ids, np.int64), dense(weight), out, ids.size, V, D, first_row
    )
    return out


@c_kernel("embedding_backward_")
def embedding_backward_(
    c: Any, grad_y: Any, ids: Any, grad_weight: Any, first_row: int = 0, accumulate: bool = True
) -> None:
    V, D = grad_weight.shape
    ids = np.ascontiguousarray(ids, np.int64)
    c.embedding_backward(
        pool(), dense(grad_y), ids, grad_weight, ids.size, V, D, first_row, accumulate
    )
