"""The sum of squares in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.native import c_kernel, dense, pool
from minillm.kernels.pool import get_threads


@c_kernel("sum_of_squares")
def sum_of_squares(c: Any, x: Any) -> float:
    partials = np.zeros(get_threads())
    c.sum_of_squares(pool(), dense(x), partials, x.size)
    return float(partials.sum())
