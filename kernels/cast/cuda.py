"""Casts on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, empty
from minillm.kernels.gpu.grids import blocks
from minillm.kernels.gpu.launching import element, launch
from minillm.kernels.gpu.registering import DTYPES, cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS, _TAKEN = 256, 8


@cuda_kernel("cast")
def cast(x: Any, dtype: Any, out: Any = None) -> Any:
    if str(np.dtype(dtype)) not in DTYPES:
        raise TypeError(f"a CUDA kernel casts to {', '.join(DTYPES)}, not to {dtype}")
    computed = out if out is not None and out.flags.c_contiguous else empty(x.shape, dtype, x)
    grid = (blocks(x.size, _THREADS * _TAKEN),)
    defines = {"ELEMENT": element(x), "RESULT": element(computed)}
    launch(_FILE, "cast", defines, grid, (_THREADS,), (dense(x), computed, np.int64(x.size)))
    return deliver(computed, out)
