"""Layer normalisation on the GPU.

Means, reciprocal deviations and the gradients of parameters are float32 for any dtype of x.
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


@cuda_kernel("layernorm_forward")
def layernorm_forward(
    x: Any,
    weight: Any,
    bias: Any,
    eps: float,
    delta: Any = None,
    sum_out: Any = None,
    delta_bias: Any = None,
) -> tuple[Any, Any, Any]:
    same_dtype(x, weight, bias, delta, delta_bias, sum_out)
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    layout = rows_in_registers(D)
    y, mean, rstd = (
        empty(x.shape, x.dtype, x),
        empty(num_rows, np.float32, x),
        empty(num_rows, np.float32, x),
    )
    total = None if sum_out is None else out_like(x, sum_out)
    arrays = (
        dense(x),
        None if delta is None else dense(delta),
        None if delta_bias is None else dense(delta_bias),
        dense(weight),
        None if bias is None else dense(bias),
        total,
        y,
        mean,
        rstd,
    )
    args = (*arrays, np.int64(num_rows), np.int32(D), np.float32(eps))
    defines: Defines = {"ELEMENT": element(x), "VALUES": layout.values}
    launch(
        _FILE, "layernorm_forward", defines, (blocks(num_rows, layout.rows),), layout.block, args
    )
    if total is not None:
        deliver(total, sum_out)
    return y, mean, rstd


@cuda_kernel("layernorm_backward")
def layernorm_backward(
    grad_y: Any,
    x: Any,
    weight: Any,
    mean: Any,
    rstd: Any,
    need_x: bool = True,
    need_params: bool = True,
    has_bias: bool = True,
    grad_x_out: Any = None,
    grad_sum: Any = None,
    grad_weight_out: Any = None,
    grad_bias_out: Any = None,
) -> tuple[Any, Any, Any]:
    same_dtype(x, grad_y, weight, grad_x_out, grad_sum)
    num_rows, D = x.size // x.shape[-1], x.shape[-1]
    layout = rows_in_registers(D, 16 if x.dtype.itemsize == 4 and D <= 4096 else 32)
    defines: Defines = {"ELEMENT": element(x), "VALUES": layout.values}
    grid = min(
        blocks(num_rows, layout.rows),
        resident_blocks(_FILE, "layernorm_backward", defines, layout.block, x),
    )
    grad_x = out_like(x, grad_x_out) if need_x else None
    partials = empty((2, grid, D), np.float32, x) if need_params else None
    arrays = (
        dense(grad_y),
        None if grad_sum is None else dense(grad_sum),
        dense(x),
        dense(weight),
        mean,
        rstd,
        grad_x,
        partials,
    )
    launch(
        _FILE,
        "layernorm_backward",
        defines,
        (grid,),
        layout.block,
        (*arrays, np.int64(num_rows), np.int32(D)),
    )
    if need_x:
        grad_x = deliver(grad_x, grad_x_out)
    if partials is None:
        return grad_x, None, None
    outs = grad_weight_out, grad_bias_out if has_bias else None
    grad_weight, grad_bias = sum_rows(partials, *outs)
    return grad_x, grad_weight, grad_bias if has_bias else None
