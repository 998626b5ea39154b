"""Activations in C."""

from __future__ import annotations

from typing import Any

import numpy as np
from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.native import c_kernel, pool


def _forward(function: Any, x: Any) -> Any:
    x = dense(x)
    y = np.empty(x.shape, x.dtype)
    function(pool(), x, y, x.size)
    return y


def _backward(function: Any, grad_y: Any, x: Any, out: Any) -> Any:
    grad_x = out_like(x, out)
    function(pool(), dense(grad_y), dense(x), grad_x, x.size)
    return deliver(grad_x, out)


@c_kernel("gelu_forward")
def gelu_forward(c: Any, x: Any, approximate: str, bias: Any = None) -> Any:
    return _forward(
        {"tanh": c.gelu_tanh_forward, "erf": c.gelu_erf_forward}[approximate],
        x if bias is None else x + bias,
    )


@c_kernel("gelu_backward")
def gelu_backward(
    c: Any, grad_y: Any, x: Any, approximate: str, out: Any = None, bias: Any = None
) -> Any:
    x = x if bias is None else x + bias
    return _backward(
        {"tanh": c.gelu_tanh_backward, "erf": c.gelu_erf_backward}[approximate], grad_y, x, out
    )


@c_kernel("relu_forward")
def relu_forward(c: Any, x: Any) -> Any:
    return _forward(c.relu_forward, x)


@c_kernel("relu_backward")
def relu_backward(c: Any, grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward(c.relu_backward, grad_y, x, out)


@c_kernel("relu2_forward")
def relu2_forward(c: Any, x: Any) -> Any:
    return _forward(c.relu2_forward, x)


@c_kernel("relu2_backward")
def relu2_backward(c: Any, grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward(c.relu2_backward, grad_y, x, out)


@c_kernel("silu_forward")
def silu_forward(c: Any, x: Any) -> Any:
    return _forward(c.silu_forward, x)


@c_kernel("silu_backward")
def silu_backward(c: Any, grad_y: Any, x: Any, out: Any = None) -> Any:
    return _backward(c.silu_backward, grad_y, x, out)


def _gated(function: Any, gate_up: Any) -> Any:
    num_rows, F = gate_up.shape[0], gate_up.shape[1] // 2
    y = np.empty((num_rows, F), gate_up.dtype)
    function(pool(), dense(gate_up), y, num_rows, F)
    return y


def _gated_backward(function: Any, grad_y: Any, gate_up: Any) -> Any:
    num_rows, F = gate_up.shape[0], gate_up.shape[1] // 2
    grad = np.empty(gate_up.shape, gate_up.dtype)
    function(pool(), dense(grad_y), dense(gate_up), grad, num_rows, F)
    return grad


@c_kernel("swiglu_forward")
def swiglu_forward(c: Any, gate_up: Any) -> Any:
    return _gated(c.swiglu_forward, gate_up)


@c_kernel("swiglu_backward")
def swiglu_backward(c: Any, grad_y: Any, gate_up: Any) -> Any:
    return _gated_backward(c.swiglu_backward, grad_y, gate_up)


@c_kernel("geglu_forward")
def geglu_forward(c: Any, gate_up: Any) -> Any:
    return _gated(c.geglu_forward, gate_up)


@c_kernel("geglu_backward")
def geglu_backward(c: Any, grad_y: Any, gate_up: Any) -> Any:
    return _gated_backward(c.geglu_backward, grad_y, gate_up)
