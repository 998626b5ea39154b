"""What the reduction of gradients is made of: sums of arrays, and the sum of squares behind the
gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from minillm.kernels.registry import kernel

_PIECE = 1 << 16


@kernel("sum_of_squares")
def sum_of_squares(x: Any) -> float:
    """Sum of x^2 over a 1-D array: BLAS dot products of pieces, added in float64. On a GPU it is an
    array without dims, not waited for."""
    return float(
        sum(float(np.dot(x[i : i + _PIECE], x[i : i + _PIECE])) for i in range(0, x.size, _PIECE))
    )


@kernel("sum_arrays")
def sum_arrays(out: Any, parts: Sequence[Any]) -> float:
    """out = parts[0] + parts[1] + ..., added in this order, for 1-D arrays of one size, of which
    `out` may be one; returns the sum of out^2, as sum_of_squares does."""
    squares = 0.0
    for i in range(0, out.size, _PIECE):
        piece = slice(i, i + _PIECE)
        total = parts[0][piece].copy()
        for part in parts[1:]:
            total += part[piece]
        out[piece] = total
        squares += float(np.dot(total, total))
    return squares
