"""Timed calls of a training step: lstm, as one step in time of as many rows."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    gates = sizes.normals(sizes.rows, 4 * sizes.dim)
    c, h, grad = (sizes.normals(sizes.rows, sizes.dim) for _ in range(3))
    yield Call(kernels.lstm_forward_, 2 * gates.nbytes + 3 * c.nbytes, gates, c, h.copy(), h)
    gates = abs(gates) / 10  # activations, which a repeated call must not blow up
    yield Call(kernels.lstm_backward_, 2 * gates.nbytes + 5 * c.nbytes, gates, c, h, grad, grad)
