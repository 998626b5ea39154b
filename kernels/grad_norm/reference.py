"""The sum of squares behind the gradient norm."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.registry import kernel

_PIECE = 1 << 16


@kernel("sum_of_squares")
def sum_of_squares(x: Any) -> float:
    """Sum of x^2 over a 1-D array: BLAS dot products of pieces, added in float64."""
    return float(sum(float(np.dot(x[i : i + _PIECE], x[i : i + _PIECE])) for i in range(0, x.size, _PIECE)))
