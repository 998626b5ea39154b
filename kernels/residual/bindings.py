"""The residual sum in C."""

from __future__ import annotations

from typing import Any

from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.native import c_kernel, pool


@c_kernel("add")
def add(c: Any, x: Any, y: Any, out: Any = None) -> Any:
    total = out_like(x, out)
    c.add(pool(), dense(x), dense(y), total, x.size)
    return deliver(total, out)
