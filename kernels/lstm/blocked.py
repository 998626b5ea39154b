"""LSTM cell in NumPy; a window as one product and one cell a step, of any backend."""

from __future__ import annotations

from typing import Any

from minillm.kernels.arrays import namespace
from minillm.kernels.matmul.packed import packed
from minillm.kernels.registry import kernel, lookup


def _split(gates: Any) -> list[Any]:
    """Return views of the four gates."""
    H = gates.shape[1] // 4
    return [gates[:, at * H : (at + 1) * H] for at in range(4)]


def _sigmoid_(x: Any, xp: Any) -> None:
    """Overwrite x by (1 + tanh(x / 2)) / 2, which cannot overflow."""
    x *= 0.5
    xp.tanh(x, out=x)
    x *= 0.5
    x += 0.5


@kernel("lstm_forward_")
def lstm_forward_(gates: Any, c_before: Any, c_out: Any = None, h_out: Any = None) -> Any:
    xp = namespace(gates)
    i, f, g, o = _split(gates)
    for gate in (i, f, o):
        _sigmoid_(gate, xp)
    xp.tanh(g, out=g)
    c = xp.multiply(f, c_before, out=c_out)
    c += i * g
    h = xp.tanh(c, out=h_out)
    h *= o
    return c, h


@kernel("lstm_backward_")
def lstm_backward_(gates: Any, c_before: Any, c: Any, grad_h: Any, grad_c: Any) -> None:
    xp = namespace(gates)
    i, f, g, o = _split(gates)
    through = xp.tanh(c)
    grad_c += grad_h * o * (1 - through * through)
    through *= grad_h
    o *= through * (1 - o)
    grad_f = grad_c * c_before * f * (1 - f)
    grad_g = grad_c * i * (1 - g * g)
    i *= grad_c * g * (1 - i)
    g[...] = grad_g
    grad_c *= f
    f[...] = grad_f


@kernel("lstm_window_forward_")
def lstm_window_forward_(gates: Any, weights: Any, states: Any) -> None:
    product, cell = lookup("matmul", gates), lookup("lstm_forward_", gates)
    right, (h, c) = packed(weights.T, gates.shape[1]), states
    for t in range(len(gates)):
        product(h[t], right, out=gates[t], accumulate=True)
        cell(gates[t], c[t], c[t + 1], h[t + 1])


@kernel("lstm_window_backward_")
def lstm_window_backward_(gates: Any, weights: Any, states: Any, grad_h: Any, grad_c: Any) -> None:
    product, cell = lookup("matmul", gates), lookup("lstm_backward_", gates)
    right, c = packed(weights, gates.shape[1]), states[1]
    for t in reversed(range(len(gates))):
        cell(gates[t], c[t], c[t + 1], grad_h[t], grad_c)
        if t:
            product(gates[t], right, out=grad_h[t - 1], accumulate=True)
