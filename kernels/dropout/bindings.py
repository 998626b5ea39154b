"""Dropout in C."""

from __future__ import annotations

from typing import Any

from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.native import c_kernel, pool
from minillm.kernels.random.hashing import address_words, column_words, threshold


@c_kernel("dropout_forward")
def dropout_forward(
    c: Any, x: Any, p: float, key: int, samples: Any, times: Any, channels: Any, out: Any = None
) -> Any:
    B, T, C = x.shape
    y = out_like(x, out)
    rows = address_words(key, samples, times)
    c.dropout(
        pool(), dense(x), y, rows, column_words(channels), B * T, C, threshold(p), 1 / (1 - p)
    )
    return deliver(y, out)
