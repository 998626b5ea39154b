"""The residual sum and the addition of a bias on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import element, launch, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS = 256
_ROWS = 4 * _THREADS // 32  # of a block that adds a bias


@cuda_kernel("add")
def add(x: Any, y: Any, out: Any = None) -> Any:
    same_dtype(x, y, out)
    computed = out_like(x, out)
    grid = (blocks(runs(x.size, x.dtype), _THREADS),)
    launch(
        _FILE,
        "add",
        {"ELEMENT": element(x)},
        grid,
        (_THREADS,),
        (dense(x), dense(y), computed, np.int64(x.size)),
    )
    return deliver(computed, out)


@cuda_kernel("add_bias_")
def add_bias_(x: Any, bias: Any) -> Any:
    same_dtype(x, bias)
    D = x.shape[-1]
    num_rows = x.size // D
    computed = dense(x)
    grid = (blocks(num_rows, _ROWS), blocks(runs(D, x.dtype), 32))
    args = (computed, dense(bias), np.int64(num_rows), np.int32(D))
    launch(_FILE, "add_bias", {"ELEMENT": element(x)}, grid, (32, _THREADS // 32), args)
    return deliver(computed, x)
