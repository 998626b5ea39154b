"""LSTM cell (Hochreiter and Schmidhuber 1997; Gers et al. 2000): its pointwise part, and a window.

Gates are laid out [input | forget | candidate | output], as in PyTorch.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def _sigmoid(x: Any) -> Any:
    return 1 / (1 + np.exp(-x))


def lstm_forward_(gates: Any, c_before: Any, c_out: Any = None, h_out: Any = None) -> Any:
    """Return the cell state c = f c_before + i g and the output h = o tanh(c), [B, H] each.

    gates: [B, 4 H], pre-activations, overwritten by i, f, g and o: the sigmoid of all but the
    candidate g, which is a tanh.
    c_before: [B, H], the cell state of the step before.
    c_out, h_out: [B, H], take the results.
    """
    H = c_before.shape[1]
    i, f, g, o = (gates[:, at * H : (at + 1) * H] for at in range(4))
    for gate in (i, f, o):
        gate[...] = _sigmoid(gate)
    g[...] = np.tanh(g)
    c = np.empty_like(c_before) if c_out is None else c_out
    h = np.empty_like(c_before) if h_out is None else h_out
    c[...] = f * c_before + i * g
    h[...] = o * np.tanh(c)
    return c, h


def lstm_backward_(gates: Any, c_before: Any, c: Any, grad_h: Any, grad_c: Any) -> None:
    """Turn the gradient of h and c into that of the pre-activations and of c_before.

    gates: [B, 4 H], the activations that `lstm_forward_` left; overwritten by the gradient of the
    pre-activations.
    c_before, c, grad_h: [B, H].
    grad_c: [B, H], the gradient of c that does not come through h; overwritten by that of c_before.
    """
    H = c.shape[1]
    i, f, g, o = (gates[:, at * H : (at + 1) * H].copy() for at in range(4))
    through = np.tanh(c)
    total = grad_c + grad_h * o * (1 - through**2)
    gates[:, :H] = total * g * i * (1 - i)
    gates[:, H : 2 * H] = total * c_before * f * (1 - f)
    gates[:, 2 * H : 3 * H] = total * i * (1 - g**2)
    gates[:, 3 * H :] = grad_h * through * o * (1 - o)
    grad_c[...] = total * f


def lstm_window_forward_(gates: Any, weights: Any, states: Any) -> None:
    """Run the T steps of a window, each from the h of the step before.

    gates: [T, B, 4 H], the inputs' part of the pre-activations; overwritten by i, f, g and o.
    weights: [4 H, H], the recurrent matrix.
    states: [2, T + 1, B, H], all h and all c; the first of each is read, the others are filled.
    """
    h, c = states
    for t in range(len(gates)):
        gates[t] += h[t] @ weights.T
        lstm_forward_(gates[t], c[t], c[t + 1], h[t + 1])


def lstm_window_backward_(gates: Any, weights: Any, states: Any, grad_h: Any, grad_c: Any) -> None:
    """Turn the gradients of a window's outputs into those of its pre-activations.

    gates: [T, B, 4 H], as `lstm_window_forward_` left them; overwritten by the gradients.
    weights, states: as there.
    grad_h: [T, B, H], the outputs' gradients; those through later steps are added.
    grad_c: [B, H], the gradient of the last cell state; overwritten by that of the first.
    """
    c = states[1]
    for t in reversed(range(len(gates))):
        lstm_backward_(gates[t], c[t], c[t + 1], grad_h[t], grad_c)
        if t:
            grad_h[t - 1] += gates[t] @ weights
