"""Dropout on the GPU: the masks of the NumPy reference, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, empty, namespace, out_like
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import element, launch, multiprocessors, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel
from minillm.kernels.random.hashing import COLUMN_KEY, threshold

_FILE = Path(__file__).with_name("v1.cu")
_WARPS = 8


def mask_words(x: Any, key: int, samples: Any, times: Any, channels: Any) -> tuple[Any, Any]:
    """Hash addresses on the device of `x`, as in kernels/random/hashing.py.

    Returns a word for each sample [B] and time [T], uint64 [B T], and one for each channel, uint32
    [C]. Addresses on the device are not copied.
    """
    samples, times, channels = (
        dense(namespace(x).asarray(a, np.int64)) for a in (samples, times, channels)
    )
    num_rows, T, C = len(samples) * len(times), len(times), len(channels)
    rows, columns = empty(num_rows, np.uint64, x), empty(C, np.uint32, x)
    counts = (
        np.int64(num_rows),
        np.int32(T),
        np.int32(C),
        np.uint64(key & 0xFFFFFFFFFFFFFFFF),
        np.uint64(COLUMN_KEY),
    )
    grid = (blocks(max(num_rows, C), 256),)
    launch(
        _FILE,
        "dropout_words",
        {"ELEMENT": element(x)},
        grid,
        (256,),
        (samples, times, channels, rows, columns, *counts),
    )
    return rows, columns


@cuda_kernel("dropout_forward")
def dropout_forward(
    x: Any, p: float, key: int, samples: Any, times: Any, channels: Any, out: Any = None
) -> Any:
    same_dtype(x, out)
    B, T, C = x.shape
    num_rows = B * T
    rows, columns = mask_words(x, key, samples, times, channels)
    y = out_like(x, out)
    tiles = blocks(runs(C, x.dtype), 32)
    grid = (
        (
            tiles,
            min(blocks(num_rows, _WARPS), 65535, blocks(32 * multiprocessors(x), max(1, tiles))),
        )
        if x.size
        else (0,)
    )
    args = (
        dense(x),
        y,
        rows,
        columns,
        np.int64(num_rows),
        np.int32(C),
        np.uint32(threshold(p)),
        np.float32(1 / (1 - p)),
    )
    launch(_FILE, "dropout", {"ELEMENT": element(x)}, grid, (32, _WARPS), args)
    return deliver(y, out)
