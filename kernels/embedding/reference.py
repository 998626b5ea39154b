"""Embedding lookup, id by id."""

from __future__ import annotations

from typing import Any

import numpy as np


def embedding_forward(ids: Any, weight: Any, first_row: int = 0) -> Any:
    """Rows of a table, of which this rank may hold a part.

    ids: integers of any shape. weight: [V_local, D], rows first_row to first_row + V_local.
    Returns [*ids.shape, D]; zeros for ids whose row is not here.
    """
    y = np.zeros((*ids.shape, weight.shape[1]), weight.dtype)
    for place, token in np.ndenumerate(ids):
        if 0 <= token - first_row < len(weight):
            y[place] = weight[token - first_row]
    return y


def embedding_backward_(
    grad_y: Any, ids: Any, grad_weight: Any, first_row: int = 0, accumulate: bool = True
) -> None:
    """Add each row of grad_y to the row of grad_weight that its id names, in place.

    grad_y: [*ids.shape, D]. grad_weight: [V_local, D], overwritten if not `accumulate`.
    Invariant: the order of the sum depends on the shapes and ids alone.
    """
    if not accumulate:
        grad_weight[...] = 0
    for place, token in np.ndenumerate(ids):
        if 0 <= token - first_row < len(grad_weight):
            grad_weight[token - first_row] += grad_y[place]
