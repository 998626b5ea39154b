"""Sums of arrays and of squares in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense
from minillm.kernels.native import c_kernel, pool


@c_kernel("sum_of_squares")
def sum_of_squares(c: Any, x: Any) -> float:
    total = np.empty(1)
    c.sum_of_squares(pool(), dense(x), total, x.size)
    return float(total[0])


@c_kernel("sum_arrays")
def sum_arrays(c: Any, out: Any, parts: Sequence[Any]) -> float:
    parts = [dense(part) for part in parts]
    addresses = np.array([part.__array_interface__["data"][0] for part in parts], np.uint64)
    total = np.empty(1)
    c.sum_arrays(pool(), addresses, out, total, len(parts), out.size)
    return float(total[0])
