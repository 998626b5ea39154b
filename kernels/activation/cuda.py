"""Activations on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, empty, out_like
from minillm.kernels.gpu.grids import blocks, runs
from minillm.kernels.gpu.launching import element, launch, same_dtype
from minillm.kernels.gpu.registering import cuda_kernel

_FILE = Path(__file__).with_name("v1.cu")
_THREADS = 256


def _launch(name: str, rows: int, F: int, *arrays: Any) -> Any:
    """Run a kernel over [rows, F]; returns the last array."""
    same_dtype(*arrays)
    out = arrays[-1]
    tiles = blocks(runs(F, out.dtype), _THREADS)
    launch(
        _FILE,
        name,
        {"ELEMENT": element(out)},
        (rows * tiles,),
        (_THREADS,),
        (*arrays, np.int64(F), np.int32(tiles)),
    )
    return out


def _shape(x: Any, bias: Any) -> tuple[int, int]:
    """x as rows of the bias's length; one row where there is none, since then rows mean nothing."""
    F = x.size if bias is None else bias.size
    return (x.size // F if F else 0), F


def _forward(name: str, x: Any, bias: Any = None) -> Any:
    return _launch(
        f"{name}_forward",
        *_shape(x, bias),
        dense(x),
        None if bias is None else dense(bias),
        empty(x.shape, x.dtype, x),
    )


def _backward(name: str, grad_y: Any, x: Any, out: Any, bias: Any = None) -> Any:
    arrays = (dense(grad_y), dense(x), None if bias is None else dense(bias), out_like(x, out))
    return deliver(_launch(f"{name}_backward", *_shape(x, bias), *arrays), out)


@cuda_kernel("gelu_forward")
def gelu_forward(x: Any, approximate: str, bias: Any = None) -> Any:
    return _forward(f"gelu_{approximate}", x, bias)


@cuda_kernel("gelu_backward")
def gelu_backward(grad_y: Any, x: Any, approximate: str, out: Any = None, bias: Any = None) -> Any:
    return _backward(f"gelu_{approximate}", grad_y, x, out, bias)


@cuda_kernel("relu_forward")
def relu_forward(x: Any) -> Any:
    return _forward("relu", x)


@cuda_kernel("relu_backward")
def relu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward("relu", grad_y, x, out)


@cuda_kernel("relu2_forward")
def relu2_forward(x: Any) -> Any:
    return _forward("relu2", x)


@cuda_kernel("relu2_backward")
def relu2_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward("relu2", grad_y, x, out)


@cuda_kernel("silu_forward")
def silu_forward(x: Any) -> Any:
    return _forward("silu", x)


@cuda_kernel("silu_backward")
def silu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward("silu", grad_y, x, out)


def _gated(name: str, gate_up: Any) -> Any:
    rows, F = len(gate_up), gate_up.shape[1] // 2
    return _launch(name, rows, F, dense(gate_up), empty((rows, F), gate_up.dtype, gate_up))


def _gated_backward(name: str, grad_y: Any, gate_up: Any) -> Any:
    grad = empty(gate_up.shape, gate_up.dtype, gate_up)
    return _launch(name, *grad_y.shape, dense(grad_y), dense(gate_up), grad)


@cuda_kernel("swiglu_forward")
def swiglu_forward(gate_up: Any) -> Any:
    return _gated("swiglu_forward", gate_up)


@cuda_kernel("swiglu_backward")
def swiglu_backward(grad_y: Any, gate_up: Any) -> Any:
    return _gated_backward("swiglu_backward", grad_y, gate_up)


@cuda_kernel("geglu_forward")
def geglu_forward(gate_up: Any) -> Any:
    return _gated("geglu_forward", gate_up)


@cuda_kernel("geglu_backward")
def geglu_backward(grad_y: Any, gate_up: Any) -> Any:
    return _gated_backward("geglu_backward", grad_y, gate_up)
