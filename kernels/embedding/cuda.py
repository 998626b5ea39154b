"""Embedding on the GPU. The gradient of the table may be float32 where grad_y is narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense, empty
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import element, launch
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_WARPS, _CHUNK = 8, 64


def _ids(ids: Any) -> Any:
    return dense(ids.astype(np.int64, copy=False))


@cuda_kernel("embedding_forward")
def embedding_forward(ids: Any, weight: Any, first_row: int = 0) -> Any:
    V, D = weight.shape
    out = empty((*ids.shape, D), weight.dtype, weight)
    args = (
        _ids(ids),
        dense(weight),
        out,
        np.int64(ids.size),
        np.int64(V),
        np.int32(D),
        np.int64(first_row),
    )
    defines = {"ELEMENT": element(weight), "SUM": element(weight)}
    launch(_FILE, "embedding_forward", defines, (blocks(ids.size, _WARPS),), (32, _WARPS), args)
    return out


@cuda_kernel("embedding_backward_")
def embedding_backward_(
    grad_y: Any, ids: Any, grad_weight: Any, first_row: int = 0, accumulate: bool = True
) -> None:
    if not grad_weight.flags.c_contiguous:
        raise ValueError("grad_weight is added to in place, and must be C-contiguous")
    V, D = grad_weight.shape
    if not accumulate:
        grad_weight.fill(0)
    flat = _ids(ids).reshape(-1)
    order = flat.argsort(kind="stable")
    keys = flat[order]
    counts = (np.int64(flat.size), np.int64(V), np.int32(D), np.int64(first_row))
    defines = {"ELEMENT": element(grad_y), "SUM": element(grad_weight)}
    chunks, tiles = blocks(flat.size, _CHUNK), blocks(runs(D, grad_y.dtype), 32)
    partials = empty((chunks, 2, D), np.float32, grad_y)
    args = (dense(grad_y), order, keys, grad_weight, partials, *counts)
    launch(_FILE, "embedding_backward", defines, (chunks, tiles), (32, _WARPS), args)
    if chunks > 1:
        grid = (blocks(chunks, _WARPS), tiles)
        launch(
            _FILE,
            "embedding_backward_long",
            defines,
            grid,
            (32, _WARPS),
            (keys, partials, grad_weight, *counts),
        )
