"""Rotary positions in C."""

from __future__ import annotations

from typing import Any

from minillm.kernels.arrays import dense
from minillm.kernels.native import c_kernel, pool


@c_kernel("rope_")
def rope_(c: Any, x: Any, cos: Any, sin: Any, inverse: bool = False) -> None:
    if x.strides[3] != x.itemsize:
        turned = x.copy()
        rope_(c, turned, cos, sin, inverse)
        x[...] = turned
        return
    c.rope(pool(), x, dense(cos), dense(sin), *x.shape, inverse)
