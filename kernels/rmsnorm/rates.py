"""Timed calls of a training step: rmsnorm."""

from __future__ import annotations

from collections.abc import Iterator

from minillm.kernels.rate import Call, StepSizes

from minillm import kernels


def calls(sizes: StepSizes) -> Iterator[Call]:
    x, grad = (sizes.normals(sizes.rows, sizes.dim) for _ in range(2))
    weight = sizes.normals(sizes.dim)
    _, rstd = kernels.rmsnorm_forward(x, weight, 1e-5)
    yield Call(kernels.rmsnorm_forward, 2 * x.nbytes, x, weight, 1e-5)
    yield Call(kernels.rmsnorm_backward, 3 * x.nbytes, grad, x, weight, rstd)
