"""Activations in NumPy, in pieces that stay in cache through all their passes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from minillm.kernels.activation.erf import erf
from minillm.kernels.pool import parallel_for
from minillm.kernels.registry import kernel
from minillm.kernels.rows import BLOCK_BYTES, row_blocks

_C0, _C1 = math.sqrt(2 / math.pi), 0.044715


def _flat(x: Any, out: Any, fn: Callable[..., None], *more: Any) -> Any:
    """Run fn(x, *more, out) over cache-sized pieces of contiguous arrays."""
    views = [a.reshape(-1) for a in (x, *more)]
    target = out.reshape(-1)
    step = BLOCK_BYTES // (4 * x.itemsize)

    def run(start: int, stop: int) -> None:
        for first in range(start, stop, step):
            part = slice(first, min(first + step, stop))
            fn(*(v[part] for v in views), target[part])

    parallel_for(views[0].size, run, step)
    return out


def _sigmoid_(z: Any) -> Any:
    """1 / (1 + exp(-z)) in place; large |z| saturate without a warning."""
    np.negative(z, out=z)
    np.minimum(z, 80.0, out=z)
    np.exp(z, out=z)
    z += 1
    return np.reciprocal(z, out=z)


def _gate(x: Any) -> Any:
    """sigmoid(2 u) with u = sqrt(2/pi) (x + 0.044715 x^3), which equals (1 + tanh u) / 2."""
    z = x * x
    z *= 2 * _C0 * _C1
    z += 2 * _C0
    z *= x
    return _sigmoid_(z)


def _gelu_tanh(x: Any, out: Any) -> None:
    np.multiply(_gate(x), x, out=out)


def _gelu_tanh_parts(x: Any) -> tuple[Any, Any]:
    """Value and slope."""
    s = _gate(x)
    slope = x * x
    slope *= 6 * _C0 * _C1
    slope += 2 * _C0
    slope *= x
    slope *= 1 - s
    slope += 1
    slope *= s
    s *= x
    return s, slope


def _gelu_tanh_backward(x: Any, grad: Any, out: Any) -> None:
    np.multiply(_gelu_tanh_parts(x)[1], grad, out=out)


def _silu(x: Any, out: Any) -> None:
    out[...] = x
    _sigmoid_(out)
    out *= x


def _silu_parts(x: Any) -> tuple[Any, Any]:
    """Value and slope s + x s (1 - s), with s = sigmoid(x)."""
    s = _sigmoid_(x.copy())
    value = x * s
    slope = value * (1 - s)
    slope += s
    return value, slope


def _silu_backward(x: Any, grad: Any, out: Any) -> None:
    np.multiply(_silu_parts(x)[1], grad, out=out)


def _relu2(x: Any, out: Any) -> None:
    np.maximum(x, 0, out=out)
    out *= out


def _relu2_backward(x: Any, grad: Any, out: Any) -> None:
    slope = np.maximum(x, 0)
    slope *= 2
    np.multiply(slope, grad, out=out)


def _gelu_erf(x: Any, out: Any) -> None:
    np.multiply(x, (0.5 * (1 + erf(x * math.sqrt(0.5)))).astype(x.dtype), out=out)


def _gelu_erf_backward(x: Any, grad: Any, out: Any) -> None:
    wide = x.astype(np.float64)
    slope = 0.5 * (1 + erf(wide * math.sqrt(0.5))) + wide * np.exp(-0.5 * wide * wide) / math.sqrt(
        2 * math.pi
    )
    np.multiply(slope.astype(x.dtype), grad, out=out)


_FORWARD = {"tanh": _gelu_tanh, "erf": _gelu_erf}
_BACKWARD = {"tanh": _gelu_tanh_backward, "erf": _gelu_erf_backward}


@kernel("gelu_forward")
def gelu_forward(x: Any, approximate: str, bias: Any = None) -> Any:
    x = np.ascontiguousarray(x if bias is None else x + bias)
    return _flat(x, np.empty_like(x), _FORWARD[approximate])


@kernel("gelu_backward")
def gelu_backward(grad_y: Any, x: Any, approximate: str, out: Any = None, bias: Any = None) -> Any:
    x = x if bias is None else x + bias
    grad_y = np.ascontiguousarray(grad_y)
    return _flat(
        np.ascontiguousarray(x),
        np.empty_like(x) if out is None else out,
        _BACKWARD[approximate],
        grad_y,
    )


@kernel("relu_forward")
def relu_forward(x: Any) -> Any:
    return np.maximum(x, 0)


@kernel("relu_backward")
def relu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return np.multiply(grad_y, x > 0, out=out)


def _pointwise(fn: Callable[..., None], x: Any, *more: Any, out: Any = None) -> Any:
    x = np.ascontiguousarray(x)
    return _flat(x, np.empty_like(x) if out is None else out, fn, *map(np.ascontiguousarray, more))


@kernel("relu2_forward")
def relu2_forward(x: Any) -> Any:
    return _pointwise(_relu2, x)


@kernel("relu2_backward")
def relu2_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return _pointwise(_relu2_backward, x, grad_y, out=out)


@kernel("silu_forward")
def silu_forward(x: Any) -> Any:
    return _pointwise(_silu, x)


@kernel("silu_backward")
def silu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    return _pointwise(_silu_backward, x, grad_y, out=out)


def _gated(gate_up: Any, value: Callable[..., None]) -> Any:
    """value(gate) up of gate_up [rows, 2F]."""
    F = gate_up.shape[1] // 2
    y = np.empty((len(gate_up), F), gate_up.dtype)

    def run(rows: slice) -> None:
        value(gate_up[rows, :F], y[rows])
        y[rows] *= gate_up[rows, F:]

    row_blocks(len(gate_up), 4 * F * gate_up.itemsize, run)
    return y


def _gated_backward(grad_y: Any, gate_up: Any, parts: Callable[[Any], tuple[Any, Any]]) -> Any:
    """Gradient of gate_up [rows, 2F]; `parts` returns value and slope."""
    F = gate_up.shape[1] // 2
    grad = np.empty_like(gate_up)

    def run(rows: slice) -> None:
        gate, up, dy = gate_up[rows, :F], gate_up[rows, F:], grad_y[rows]
        value, slope = parts(gate)
        np.multiply(dy, value, out=grad[rows, F:])
        slope *= up
        np.multiply(dy, slope, out=grad[rows, :F])

    row_blocks(len(gate_up), 6 * F * gate_up.itemsize, run)
    return grad


@kernel("swiglu_forward")
def swiglu_forward(gate_up: Any) -> Any:
    return _gated(gate_up, _silu)


@kernel("swiglu_backward")
def swiglu_backward(grad_y: Any, gate_up: Any) -> Any:
    return _gated_backward(grad_y, gate_up, _silu_parts)


@kernel("geglu_forward")
def geglu_forward(gate_up: Any) -> Any:
    return _gated(gate_up, _gelu_tanh)


@kernel("geglu_backward")
def geglu_backward(grad_y: Any, gate_up: Any) -> Any:
    return _gated_backward(grad_y, gate_up, _gelu_tanh_parts)
