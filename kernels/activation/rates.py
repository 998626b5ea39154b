"""Timed calls of a training step: activation."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    x, grad = (sizes.normals(sizes.rows, 4 * sizes.dim) for _ in range(2))
    half = sizes.normals(sizes.rows, 2 * sizes.dim)
    yield Call(kernels.gelu_forward, 2 * x.nbytes, x, "tanh")
    yield Call(kernels.gelu_backward, 3 * x.nbytes, grad, x, "tanh")
    yield Call(kernels.swiglu_forward, x.nbytes + half.nbytes, x)
    yield Call(kernels.swiglu_backward, 2 * x.nbytes + half.nbytes, half, x)
