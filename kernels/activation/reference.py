"""Activations of the MLP.

Backward passes start from the pre-activation, so that the forward pass keeps one array, not two.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

_erf = np.vectorize(math.erf, otypes=[np.float64])
_SQRT_2_PI, _CUBIC = math.sqrt(2 / math.pi), 0.044715


def gelu_forward(x: Any, approximate: str, bias: Any = None) -> Any:
    """GELU (Hendrycks and Gimpel 2016, arXiv:1606.08415): x Phi(x).

    x: any shape, contiguous; the last dim is F where there is a bias.
    approximate: "erf" for the exact function, "tanh" for GPT-2's formula.
    bias: [F], added to x first.
    """
    x = x if bias is None else x + bias
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(_SQRT_2_PI * (x + _CUBIC * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


def gelu_backward(grad_y: Any, x: Any, approximate: str, out: Any = None, bias: Any = None) -> Any:
    """grad_y times the derivative at x, or at x + bias.

    grad_y, x, approximate, bias: as in the forward pass.
    out: contiguous, takes the result; may be `grad_y` itself.
    """
    x = x if bias is None else x + bias
    if approximate == "tanh":
        t = np.tanh(_SQRT_2_PI * (x + _CUBIC * x**3))
        inner = _SQRT_2_PI * (1 + 3 * _CUBIC * x * x)
        slope = 0.5 * (1 + t) + 0.5 * x * (1 - t * t) * inner
    else:
        density = np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
        slope = 0.5 * (1 + _erf(x / math.sqrt(2))) + x * density
    return np.multiply(grad_y, slope, out=out)


def relu_forward(x: Any) -> Any:
    """max(x, 0), any shape."""
    return np.maximum(x, 0)


def relu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    """grad_y where x > 0, else 0; into `out` if given, which may be `grad_y` itself."""
    return np.multiply(grad_y, x > 0, out=out)


def relu2_forward(x: Any) -> Any:
    """max(x, 0)^2, any shape (So et al. 2021, arXiv:2109.08668)."""
    return np.maximum(x, 0) ** 2


def relu2_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    """grad_y times 2 max(x, 0); into `out` if given, which may be `grad_y` itself."""
    return np.multiply(grad_y, 2 * np.maximum(x, 0), out=out)


def silu_forward(x: Any) -> Any:
    """x / (1 + exp(-x)), any shape (Elfwing et al. 2017, arXiv:1702.03118)."""
    return x / (1 + np.exp(-x))


def silu_backward(grad_y: Any, x: Any, out: Any = None) -> Any:
    """grad_y times the derivative at x; into `out` if given, which may be `grad_y` itself."""
    s = 1 / (1 + np.exp(-x))
    return np.multiply(grad_y, s * (1 + x * (1 - s)), out=out)


def swiglu_forward(gate_up: Any) -> Any:
    """silu(gate) up, with silu(z) = z / (1 + exp(-z)) (Shazeer 2020, arXiv:2002.05202).

    gate_up: [rows, 2F], gate and up side by side. Returns [rows, F].
    """
    gate, up = np.split(gate_up, 2, axis=1)
    return gate / (1 + np.exp(-gate)) * up


def swiglu_backward(grad_y: Any, gate_up: Any) -> Any:
    """Gradient of gate_up [rows, 2F] from grad_y [rows, F]."""
    gate, up = np.split(gate_up, 2, axis=1)
    return np.concatenate([silu_backward(grad_y * up, gate), grad_y * silu_forward(gate)], axis=1)


def geglu_forward(gate_up: Any) -> Any:
    """gelu(gate) up, with GPT-2's formula of GELU (Shazeer 2020, arXiv:2002.05202).

    gate_up: [rows, 2F], gate and up side by side. Returns [rows, F].
    """
    gate, up = np.split(gate_up, 2, axis=1)
    return gelu_forward(gate, "tanh") * up


def geglu_backward(grad_y: Any, gate_up: Any) -> Any:
    """Gradient of gate_up [rows, 2F] from grad_y [rows, F]."""
    gate, up = np.split(gate_up, 2, axis=1)
    return np.concatenate(
        [gelu_backward(grad_y * up, gate, "tanh"), grad_y * gelu_forward(gate, "tanh")], axis=1
    )
