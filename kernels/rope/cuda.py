"""Rotary positions on the GPU. The tables may be float32 where x is narrower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import dense
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import element, launch, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS = 256


@cuda_kernel("rope_")
def rope_(x: Any, cos: Any, sin: Any, inverse: bool = False) -> None:
    same_dtype(cos, sin)
    size = x.dtype.itemsize
    if x.size and x.strides[3] != size:
        turned = x.copy()
        rope_(turned, cos, sin, inverse)
        x[...] = turned
        return
    B, T, H, K = x.shape
    total = B * T * H * runs(K // 2, x.dtype)
    if total >= 1 << 32:
        raise ValueError(f"rope_ numbers its threads with 32 bits, and x {x.shape} needs {total}")
    strides = (np.int64(s // size) for s in x.strides[:3])
    args = (
        x,
        dense(cos),
        dense(sin),
        np.uint32(total),
        np.int32(T),
        np.int32(H),
        np.int32(K // 2),
        *strides,
    )
    defines = {"ELEMENT": element(x), "TABLE": element(cos)}
    launch(
        _FILE,
        "rope",
        defines,
        (blocks(total, _THREADS),),
        (_THREADS,),
        (*args, np.float32(-1 if inverse else 1)),
    )
