"""Pointwise part of an LSTM cell in C: one pass over memory, in place."""

from __future__ import annotations

from typing import Any

from minillm.kernels.arrays import deliver, dense, out_like
from minillm.kernels.native import c_kernel, pool


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
