"""Root-mean-square normalisation on the GPU.

Reciprocal deviations and the weight's gradient are float32 for any dtype of x.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, empty, out_like
from minillm.kernels.gpu.build import Defines
from minillm.kernels.gpu.grids import blocks, rows_in_registers
from minillm.kernels.gpu.launching import element, launch, resident_blocks, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel
from minillm.kernels.matmul.cuda import sum_rows

_FILE = Path(__file__).with_name("v1.cu")


@cuda_kernel("rmsnorm_forward")
def rmsnorm_forward(
    x: Any,
    weight: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any]:
    same_dtype(x, weight, delta, delta_bias, sum_out)
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    layout = rows_in_registers(D)
    y, rstd = empty(x.shape, x.dtype, x), empty(num_rows, np.float32, x)
    total = None if sum_out is None else out_like(x, sum_out)
    args = (
        dense(x),
        None if delta is None else dense(delta),
        None if delta_bias is None else dense(delta_bias),
        dense(weight),
        total,
        y,
        rstd,
        np.int64(num_rows),
        np.int32(D),
        np.float32(eps),
    )
    defines: Defines = {"ELEMENT": element(x), "VALUES": layout.values}
    launch(_FILE, "rmsnorm_forward", defines, (blocks(num_rows, layout.rows),), layout.block, args)
    if total is not None:
        deliver(total, sum_out)
    return y, rstd


@cuda_kernel("rmsnorm_backward")
def rmsnorm_backward(
    grad_y: Any,
    x: Any,
    weight: Any,
    rstd: Any,
    need_x: bool = True,
    need_params: bool = True,
    grad_x_out: Any = None,
    grad_sum: Any = None,
    grad_weight_out: Any = None,
) -> tuple[Any, Any]:
    same_dtype(x, grad_y, weight, grad_x_out, grad_sum)
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    layout = rows_in_registers(D, 16 if x.dtype.itemsize == 4 and D <= 4096 else 32)
    defines: Defines = {"ELEMENT": element(x), "VALUES": layout.values}
    grid = min(
        blocks(num_rows, layout.rows),
        resident_blocks(_FILE, "rmsnorm_backward", defines, layout.block, x),
    )
    grad_x = out_like(x, grad_x_out) if need_x else None
    partials = empty((1, grid, D), np.float32, x) if need_params else None
    arrays = (
        dense(grad_y),
        None if grad_sum is None else dense(grad_sum),
        dense(x),
        dense(weight),
        rstd,
        grad_x,
        partials,
    )
    launch(
        _FILE,
        "rmsnorm_backward",
        defines,
        (grid,),
        layout.block,
        (*arrays, np.int64(num_rows), np.int32(D)),
    )
    if need_x:
        grad_x = deliver(grad_x, grad_x_out)
    return grad_x, None if partials is None else sum_rows(partials, grad_weight_out)[0]
