"""Optimizer updates on the GPU."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.gpu.grids import blocks
from minillm.kernels.gpu.launching import element, launch, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS, _TAKEN = 256, 4


def _flat(*arrays: Any) -> None:
    """Raise ValueError for an array that cannot be updated as flat memory."""
    for a in arrays:
        if a is not None and not a.flags.c_contiguous:
            raise ValueError(
                "optimizers update C-contiguous buffers in place, and this one has strides "
                f"{a.strides} for shape {a.shape}"
            )


def _split(grad_scale: Any, like: Any) -> tuple[float, Any]:
    """Return the scale as factors on the host and the device; the unused one is 1 or None."""
    if not isinstance(grad_scale, type(like)):
        return grad_scale, None
    return 1.0, grad_scale.astype(np.float32, copy=False)


@cuda_kernel("adamw_", dtypes=("float32",))
def adamw_(
    param: Any,
    grad: Any,
    exp_avg: Any,
    exp_avg_sq: Any,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    grad_scale: Any = 1.0,
    param_out: Any = None,
) -> None:
    same_dtype(param, exp_avg, exp_avg_sq)
    _flat(param, grad, exp_avg, exp_avg_sq, param_out)
    scale, on_device = _split(grad_scale, param)
    numbers = (
        *(scale, lr / (1 - beta1**step), 1 / math.sqrt(1 - beta2**step)),
        *(beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay),
    )
    args = (
        param,
        grad,
        exp_avg,
        exp_avg_sq,
        param_out,
        on_device,
        *map(np.float32, numbers),
        np.int64(param.size),
    )
    defines = {
        "ELEMENT": element(grad),
        "COPY": "float32" if param_out is None else element(param_out),
    }
    launch(_FILE, "adamw", defines, (blocks(param.size, _THREADS * _TAKEN),), (_THREADS,), args)


@cuda_kernel("sgd_")
def sgd_(param: Any, grad: Any, *, lr: float, grad_scale: Any = 1.0) -> None:
    same_dtype(param, grad)
    _flat(param, grad)
    scale, on_device = _split(grad_scale, param)
    args = (param, grad, on_device, np.float32(lr * scale), np.int64(param.size))
    defines = {"ELEMENT": element(grad), "COPY": "float32"}
    launch(_FILE, "sgd", defines, (blocks(param.size, _THREADS * _TAKEN),), (_THREADS,), args)
