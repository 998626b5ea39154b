"""Sums of arrays and of squares: the reduction of gradients and the gradient norm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def sum_of_squares(x: Any) -> float:
    """Sum of x^2 in float64, x [n]. On a GPU a float64 array without dims, not waited for."""
    return float((x.astype(np.float64) ** 2).sum())


def sum_arrays(out: Any, parts: Sequence[Any]) -> float:
    """out = parts[0] + parts[1] + ..., added in this order; returns sum_of_squares(out).

    out, parts: [n] each; `out` may be one of the parts.
    """
    total = parts[0]
    for part in parts[1:]:
        total = total + part
    out[...] = total
    return sum_of_squares(out)
