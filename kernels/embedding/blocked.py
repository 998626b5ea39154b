"""Embedding in NumPy; the backward pass sorts the ids or multiplies by a one-hot matrix."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.registry import kernel

# Up to this many rows of the table a product with a one-hot matrix is faster than sorting.
ONE_HOT_ROWS = 512


@kernel("embedding_forward", like=1)
def embedding_forward(ids: Any, weight: Any, first_row: int = 0) -> Any:
    local = ids - first_row
    inside = (local >= 0) & (local < len(weight))
    if inside.all():
        return weight[local]
    if not len(weight):
        return np.zeros((*ids.shape, weight.shape[1]), weight.dtype)
    out = weight[np.where(inside, local, 0)]
    out[~inside] = 0
    return out


@kernel("embedding_backward_")
def embedding_backward_(
    grad_y: Any, ids: Any, grad_weight: Any, first_row: int = 0, accumulate: bool = True
) -> None:
    if not accumulate:
        grad_weight[...] = 0
    local = ids.reshape(-1) - first_row
    rows = grad_y.reshape(len(local), -1)
    inside = np.flatnonzero((local >= 0) & (local < len(grad_weight)))
    if not len(inside):
        return
    if len(grad_weight) <= ONE_HOT_ROWS:
        one_hot = np.zeros((len(grad_weight), len(local)), grad_y.dtype)
        one_hot[local[inside], inside] = 1
        grad_weight += one_hot @ rows
        return
    order = inside[np.argsort(local[inside], kind="stable")]
    sorted_ids = local[order]
    starts = np.flatnonzero(np.r_[True, sorted_ids[1:] != sorted_ids[:-1]])
    grad_weight[sorted_ids[starts]] += np.add.reduceat(rows[order], starts, axis=0)
