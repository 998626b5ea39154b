"""Sums of arrays and of squares in NumPy: BLAS dot products of pieces, added in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from minillm.kernels.registry import kernel

_PIECE = 1 << 16


@kernel("sum_of_squares")
def sum_of_squares(x: Any) -> float:
    return float(
        sum(float(np.dot(x[i : i + _PIECE], x[i : i + _PIECE])) for i in range(0, x.size, _PIECE))
    )


@kernel("sum_arrays")
def sum_arrays(out: Any, parts: Sequence[Any]) -> float:
    squares = 0.0
    for i in range(0, out.size, _PIECE):
        piece = slice(i, i + _PIECE)
        total = parts[0][piece].copy()
        for part in parts[1:]:
            total += part[piece]
        out[piece] = total
        squares += float(np.dot(total, total))
    return squares
