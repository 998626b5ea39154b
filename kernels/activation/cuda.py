"""Activations on the GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from minillm.kernels.cuda import cuda_kernel
from minillm.kernels.grids import blocks, runs
from minillm.kernels.launch import deliver, dense, element, empty, launch, out_like, same_dtype

_FILE = Path(__file__).with_name("v1.cu")
_THREADS = 256


def _each(name: str, *arrays: Any) -> Any:
    """Run a kernel over arrays of one size, elementwise; returns the last."""
    same_dtype(*arrays)
    size = arrays[-1].size
    grid = (blocks(runs(size, arrays[-1].dtype), _THREADS),)
    launch(_FILE, name, {"ELEMENT": element(arrays[-1])}, grid, (_THREADS,), (*arrays, np.int64(size)))
    return arrays[-1]


def _backward(name: str, grad_y: Any, x: Any, out: Any) -> Any:
    return deliver(_each(f"{name}_backward", dense(grad_y), dense(x), out_like(x, out)), out)


@cuda_kernel("gelu_forward")
def gelu_forward(x: Any, approximate: str) -> Any:
    return _each(f"gelu_{approximate}_forward", dense(x), empty(x.shape, x.dtype, x))


@cuda_kernel("gelu_backward")
def gelu_backward(grad_y: Any, x: Any, approximate: str, out: Any = None) -> Any:
    return _backward(f"gelu_{approximate}", grad_y, x, out)


@cuda_kernel("relu_forward")
def relu_forward(x: Any) -> Any:
    return _each("relu_forward", dense(x), empty(x.shape, x.dtype, x))


@cuda_kernel("relu_backward")
def relu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward("relu", grad_y, x, out)


def _rows(name: str, rows: int, F: int, *arrays: Any) -> Any:
    """Run a kernel over [rows, F]; returns the last array."""
    same_dtype(*arrays)
    tiles = blocks(runs(F, arrays[0].dtype), _THREADS)
    launch(_FILE, name, {"ELEMENT": element(arrays[0])}, (rows * tiles,), (_THREADS,), (*arrays, np.int32(F), np.int32(tiles)))
    return arrays[-1]


@cuda_kernel("swiglu_forward")
def swiglu_forward(gate_up: Any) -> Any:
    rows, F = len(gate_up), gate_up.shape[1] // 2
    return _rows("swiglu_forward", rows, F, dense(gate_up), empty((rows, F), gate_up.dtype, gate_up))


@cuda_kernel("swiglu_backward")
def swiglu_backward(grad_y: Any, gate_up: Any) -> Any:
    rows, F = grad_y.shape
    return _rows("swiglu_backward", rows, F, dense(grad_y), dense(gate_up), empty(gate_up.shape, gate_up.dtype, gate_up))
