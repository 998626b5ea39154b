"""Dropout (Srivastava et al. 2014) with masks addressed by (key, sample, time, channel): any shard
of any mesh makes its own part."""

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
    """x [B, T, C] times the scaled keep mask of (samples [B], times [T], channels [C]), all global
    positions.

    The mask is 0 with probability p, else 1 / (1 - p). Into `out` (contiguous) if given, which may
    be x itself. The backward pass is the same product.
    """
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


@kernel("dropout_backward")
def dropout_backward(
    grad_y: Array,
    p: float,
    key: int,
    samples: Array,
    times: Array,
    channels: Array,
    out: Array | None = None,
) -> Array:
    """grad_y [B, T, C] times the mask of the forward pass, which is computed anew from the same
    address."""
    return dropout_forward(grad_y, p, key, samples, times, channels, out)


@kernel("dropout_mask")
def dropout_mask(
    p: float, key: int, samples: Array, times: Array, channels: Array, dtype: Any
) -> Array:
    """The scaled keep mask [B, T, C] of `dtype` itself."""
    return dropout_forward(
        np.ones((len(samples), len(times), len(channels)), dtype), p, key, samples, times, channels
    )
