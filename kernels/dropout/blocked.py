"""Dropout in NumPy: row words and column words are hashed once, and mixed block by block."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.random.hashing import address_words, column_words, keep
from minillm.kernels.registry import kernel
from minillm.kernels.rows import row_blocks

Array = Any


@kernel("dropout_forward")
def dropout_forward(
    x: Array,
    p: float,
    key: int,
    samples: Array,
    times: Array,
    channels: Array,
    out: Array | None = None,
) -> Array:
    B, T, C = x.shape
    y = np.empty(x.shape, x.dtype) if out is None else out
    flat, flat_y = x.reshape(B * T, C), y.reshape(B * T, C)
    rows, columns = address_words(key, samples, times).reshape(-1), column_words(channels)
    scale = x.dtype.type(1 / (1 - p))

    def run(part: slice) -> None:
        np.multiply(flat[part], keep(p, rows[part], columns), out=flat_y[part])
        flat_y[part] *= scale

    row_blocks(len(flat), C * x.itemsize, run)
    return y
