"""Pointwise part of an LSTM cell on the GPU."""

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


def _launch(name: str, *arrays: Any) -> None:
    """Run a kernel on gates [B, 4 H] and further arrays [B, H]."""
    same_dtype(*arrays)
    num_rows, H = arrays[1].shape
    tiles = blocks(runs(H, arrays[0].dtype), _THREADS)
    defines = {"ELEMENT": element(arrays[0])}
    sizes = (np.int64(H), np.int32(tiles))
    launch(_FILE, name, defines, (num_rows * tiles,), (_THREADS,), (*arrays, *sizes))


@cuda_kernel("lstm_forward_")
def lstm_forward_(
    gates: Any, c_before: Any, c_out: Any = None, h_out: Any = None
) -> tuple[Any, Any]:
    work = dense(gates)
    c, h = out_like(c_before, c_out), out_like(c_before, h_out)
    _launch("lstm_forward", work, dense(c_before), c, h)
    deliver(work, gates)
    return deliver(c, c_out), deliver(h, h_out)


@cuda_kernel("lstm_backward_")
def lstm_backward_(gates: Any, c_before: Any, c: Any, grad_h: Any, grad_c: Any) -> None:
    work, grad = dense(gates), dense(grad_c)
    _launch("lstm_backward", work, dense(c_before), dense(c), dense(grad_h), grad)
    deliver(work, gates)
    deliver(grad, grad_c)
