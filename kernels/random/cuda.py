"""Addressed normals on the GPU: the bits of the NumPy reference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense, empty
from minillm.kernels.gpu.grids import blocks
from minillm.kernels.gpu.launching import launch
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS = 256


@cuda_kernel("random_normal", dtypes=())
def random_normal(key: int, indices: Any) -> Any:
    indices = dense(indices.reshape(-1).astype(np.uint64, copy=False))
    out = empty(indices.shape, np.float64, indices)
    args = (indices, out, np.int64(indices.size), np.uint64(key & 0xFFFFFFFFFFFFFFFF))
    launch(_FILE, "random_normal", {}, (blocks(indices.size, _THREADS),), (_THREADS,), args)
    return out
