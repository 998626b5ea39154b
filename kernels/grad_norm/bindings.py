"""Sums of arrays and of squares in C."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense
from minillm.kernels.native import c_kernel, pool
from minillm.kernels.pool import get_threads


@c_kernel("sum_of_squares")
def sum_of_squares(c: Any, x: Any) -> float:
    partials = np.zeros(get_threads())
    c.sum_of_squares(pool(), dense(x), partials, x.size)
    return float(np.add.reduce(partials))


@c_kernel("sum_arrays")
def sum_arrays(c: Any, out: Any, parts: Sequence[Any]) -> float:
    parts = [dense(part) for part in parts]
    addresses = np.array([part.__array_interface__["data"][0] for part in parts], np.uint64)
    partials = np.zeros(get_threads())
    c.sum_arrays(pool(), addresses, out, partials, len(parts), out.size)
    return float(partials.sum())
