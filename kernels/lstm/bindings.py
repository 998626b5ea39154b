"""LSTM cell in C: the pointwise part in one pass over memory, and the loop over a window."""

from __future__ import annotations

from typing import Any

from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.lstm import blocked
from minillm.kernels.matmul.packed import FEW_ROWS, panels_of
from minillm.kernels.native import VARIANTS, c_kernel, pool


@c_kernel("lstm_forward_")
def lstm_forward_(
    c_: Any, gates: Any, c_before: Any, c_out: Any = None, h_out: Any = None
) -> tuple[Any, Any]:
    num_rows, H = c_before.shape
    work = dense(gates)
    c, h = out_like(c_before, c_out), out_like(c_before, h_out)
    c_.lstm_forward(pool(), work, dense(c_before), c, h, num_rows, H)
    deliver(work, gates)
    return deliver(c, c_out), deliver(h, h_out)


@c_kernel("lstm_backward_")
def lstm_backward_(c_: Any, gates: Any, c_before: Any, c: Any, grad_h: Any, grad_c: Any) -> None:
    num_rows, H = c.shape
    work, grad = dense(gates), dense(grad_c)
    c_.lstm_backward(pool(), work, dense(c_before), dense(c), dense(grad_h), grad, num_rows, H)
    deliver(work, gates)
    deliver(grad, grad_c)


def _in_c(gates: Any, *others: Any) -> bool:
    """Return whether the C loop takes a window of gates [T, B, 4 H] and these arrays."""
    dense = all(x.flags.c_contiguous for x in (gates, *others))
    return dense and gates.shape[1] > FEW_ROWS


@c_kernel("lstm_window_forward_", VARIANTS[:-1])  # BLAS is faster with baseline instructions
def lstm_window_forward_(c_: Any, gates: Any, weights: Any, states: Any) -> None:
    if _in_c(gates, states):
        (T, B, _), H = gates.shape, states.shape[3]
        c_.lstm_window_forward(pool(), gates, panels_of(c_, weights.T), states, T, B, H)
    else:
        blocked.lstm_window_forward_(gates, weights, states)


@c_kernel("lstm_window_backward_", VARIANTS[:-1])
def lstm_window_backward_(
    c_: Any, gates: Any, weights: Any, states: Any, grad_h: Any, grad_c: Any
) -> None:
    if _in_c(gates, states, grad_h, grad_c):
        panels = panels_of(c_, weights)
        c_.lstm_window_backward(pool(), gates, panels, states, grad_h, grad_c, *grad_h.shape)
    else:
        blocked.lstm_window_backward_(gates, weights, states, grad_h, grad_c)
